"""Losses: the contrastive losses of the paper, and a place for your own.

paper          eq. 2, eq. 3 and MRL as dense formulas: read these first
contrastive    the same on a mesh, with masks and the switches of later models
distillation   KL from a judge's scores of the candidates
blockwise      log-sum-exp over a similarity matrix that is never whole in memory
whole_batch    runs a loss of your own in training (docs/custom_loss.md)
"""

from gecko_jax.losses import blockwise, contrastive, paper, whole_batch

BatchIds = contrastive.BatchIds
contrastive_loss = contrastive.contrastive_loss
finetune_loss = paper.finetune_loss
prefinetune_loss = paper.prefinetune_loss
similarities = paper.similarities

__all__ = [
    "BatchIds",
    "blockwise",
    "contrastive",
    "contrastive_loss",
    "finetune_loss",
    "paper",
    "prefinetune_loss",
    "similarities",
    "whole_batch",
]
