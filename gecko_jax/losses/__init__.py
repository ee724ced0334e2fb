"""Losses: the contrastive losses of the paper and their relatives.

contrastive    pre-finetuning (eq. 2), fine-tuning (eq. 3), MRL, matching
blockwise      log-sum-exp over a similarity matrix that is never whole in memory
"""
