"""Training: the loop, the update, and what surrounds them.

loop             the training loop
reporting        metrics, evaluations and progress of a run
train_step       one update of the train state
gradients        loss and gradient of a global batch, in microbatches
optimizer        optimizers and schedules (optax)
initialization   a checkpoint's parameters, or fresh ones
workdirs         the workdir of a run
metrics          window means, as JSON lines and TensorBoard
nonfinite        skips or stops on a loss that is not finite
interruption     SIGTERM
t5x_adapter      the model as t5x trains it
"""
