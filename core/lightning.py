"""The same `Fit` under pytorch_lightning (`train.trainer: lightning`).

Lightning does the backward, the accumulation, the clipping, the scaling of fp16 losses and the
scheduler; autocast, batches, validation and checkpoints are those of `core.loop`, so both trainers
give the same losses to the bit.

Several devices (`core.ranks`): each process takes its rows of every micro-batch and the gradients
are averaged, so losses and weights are those of one process but for rounding. Rank 0 alone
validates, saves and reports; where frozen weights are divided (`core.sharding`) all validate.
"""

import logging
import signal
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.plugins.precision import MixedPrecision
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from core import sharding
from core.loop import SCALED, BestSoFar, Fit, autocast, delivered, end_epoch, loader, mean_loss
from core.observe import Observer
from core.ranks import Group, facts, joined, visible


def fit_lightning(fit: Fit, observer: Observer) -> None:
    """Train `fit.model` under Lightning; `fit.save` holds "best" and "last" afterwards.

    Raises NonFiniteLoss.
    """
    observer.facts.update(trainer="lightning", visible_devices=visible(fit.device))
    with ExitStack() as stack:
        if fit.group.size > 1:
            with observer.phase("set_up"):
                stack.enter_context(joined(fit.group, fit.device))
        stack.enter_context(observer.phase("train_steps"))
        shell = Shell(fit, observer)
        trainer = _trainer(fit)
        with shell.observed, _Interruptible(), warnings.catch_warnings():
            # The newer name is unknown to torch 2.5.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers. is deprecated.*")
            # Lightning's own use of a name torch has renamed, once for each batch.
            warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
            # Nothing here changes a layer's output in place.
            warnings.filterwarnings("ignore", message=".*returned a view tensor.*")
            # In fp16 the first steps are left out until the scale fits; that is no mistake.
            warnings.filterwarnings("ignore", message=".*before `optimizer.step.*")
            trainer.fit(shell)
        if not fit.group.rank:
            with observer.phase("checkpoint"):
                fit.save("last")
        if fit.group.sharded and fit.group.asked_after:
            sharding.make_whole(trainer.strategy.parts)  # last: reading a state divides it again


class Shell(pl.LightningModule):
    """Hands Lightning the parts of a `Fit`, and reports each finished micro-batch."""

    def __init__(self, fit: Fit, observer: Observer):
        super().__init__()
        self.model = fit.model
        self.fit, self.observer = fit, observer
        self.best = BestSoFar(fit)
        self.observed = ExitStack()
        """Open from the first forward to the end of its backward, outside `training_step`."""

    def configure_optimizers(self):
        if self.fit.scheduler is None:
            return self.fit.optimizer
        scheduler = {"scheduler": self.fit.scheduler, "interval": "step"}
        return {"optimizer": self.fit.optimizer, "lr_scheduler": scheduler}

    def train_dataloader(self) -> "Batches":
        """Batches of the coming epoch; Lightning asks again for each."""
        # Lightning leaves the modes of sub-modules alone, and validation leaves them in eval mode.
        self.model.train()
        self.first_step = len(self.observer.losses)
        source = loader(self.fit.batches(self.current_epoch), self.fit.num_workers, self.fit.device)
        if not len(source):
            mean_loss(
                [], self.first_step
            )  # raises, where Lightning would do nothing and be content
        self.batches = Batches(source, self.observer, self.fit.device)
        return self.batches

    def transfer_batch_to_device(self, batch: dict, device: torch.device, dataloader_idx: int):
        return batch  # `Batches` has moved it

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        if batch_idx == 0:
            self.observer.loader_processes()
            strategy = type(self.trainer.strategy).__name__
            self.observer.facts.update(strategy=strategy, **facts())
            if self.fit.group.sharded:
                found = sharding.divided(self.model)
                kept = {name: found[name] for name in ("bytes", "whole_bytes")}
                self.observer.facts["frozen_here"] = kept
        self.optimizer_steps = self.trainer.global_step
        self.fit.before_step(self.optimizer_steps)
        self.observed.enter_context(self.observer.first_step())
        with autocast(self.fit.precision, self.fit.device):
            self.loss = self.fit.loss(batch)
        return self.loss

    def on_after_backward(self) -> None:
        self.observed.close()

    def on_train_batch_end(self, outputs, batch: dict, batch_idx: int) -> None:
        self.observer.step(
            batch["samples"],
            batch["tokens"],
            batch["padded_tokens"],
            optimizer_step=self.trainer.global_step > self.optimizer_steps,
            loss=self.loss,
        )

    def on_train_epoch_end(self) -> None:
        self.batches.close()
        if self.fit.group.size > 1:
            with self.observer.phase("train_steps"):
                self.share_losses()
        stop = (self.fit.group.sharded or not self.fit.group.rank) and end_epoch(
            self.fit, self.current_epoch, self.first_step, self.best, self.observer
        )
        self.trainer.should_stop |= self.agree(stop)

    def agree(self, stop: bool) -> bool:
        """Rank 0's decision, and its random state: its validation has drawn numbers, and the
        candidates of a loss must be the same everywhere.
        """
        if self.fit.group.size == 1:
            return stop
        device = self.fit.device
        states = [torch.get_rng_state()]
        if device.type == "cuda":
            states.append(torch.cuda.get_rng_state(device))
        stop, states = self.trainer.strategy.broadcast((stop, states))
        torch.set_rng_state(states[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(states[1], device)
        return stop

    def share_losses(self) -> None:
        """Put the mean over the processes in place of each loss of the epoch; one exchange."""
        own = torch.stack(self.observer.losses[self.first_step :])
        dist.all_reduce(own)
        self.observer.losses[self.first_step :] = (own / self.fit.group.size).unbind()

    def cpu(self) -> "Shell":
        """Stay on the device: Lightning ends every fit by moving the module to the CPU."""
        return self


class Batches:
    """A loader's batches on the device, their wait measured; begun when the first is asked for.

    Lightning makes iterators it throws away, and a `DataLoader` starts its workers and draws a
    random number for each.
    """

    def __init__(self, source: DataLoader, observer: Observer, device: torch.device):
        self.source, self.observer, self.device = source, observer, device

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[dict]:
        self.running = delivered(self.source, self.observer, self.device)
        return self.running

    def close(self) -> None:
        """End the workers: Lightning stops at the last batch and never meets the iterator's end."""
        self.running.close()


def _trainer(fit: Fit) -> pl.Trainer:
    """A silent trainer on one device that writes nothing and validates nothing by itself."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    plugins = []
    if fit.precision in SCALED:
        plugins.append(LossScaling("16-mixed", fit.device.type))
        # A fused optimizer can unscale inside its step, but clipping comes before: Lightning
        # refuses the pair. This asks it to unscale first, as the loop does.
        fit.optimizer._step_supports_amp_scaling = False
    return pl.Trainer(
        accelerator=fit.device.type,
        **_devices(fit),
        plugins=plugins,
        max_epochs=fit.max_epochs,
        accumulate_grad_batches=fit.accumulate_grad_batches,
        gradient_clip_val=fit.gradient_clip_val,
        reload_dataloaders_every_n_epochs=1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _devices(fit: Fit) -> dict:
    """The options of a trainer that choose its devices and how they share the work."""
    if fit.group.size == 1:
        return {"devices": 1 if fit.device.index is None else [fit.device.index]}
    kind = Sharded if fit.group.sharded else DDPStrategy
    strategy = kind(
        cluster_environment=Ranks(fit.group),
        broadcast_buffers=False,  # the model's never change
        gradient_as_bucket_view=True,
    )
    return {"devices": fit.group.size, "strategy": strategy, "use_distributed_sampler": False}


class Sharded(DDPStrategy):
    """DDP of what is trained over frozen weights of which each process holds a part."""

    def configure_ddp(self) -> None:
        """Divide the weights; DDP is to leave alone what is no whole tensor any more."""
        self.parts = sharding.shard(self.model, self.root_device, self.world_size)
        names = sharding.divided(self.model)["names"]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, names)
        super().configure_ddp()


class Ranks(LightningEnvironment):
    """Tells Lightning that the processes are there already, and which of them this one is."""

    creates_processes_externally = True

    def __init__(self, group: Group):
        super().__init__()
        self.group = group

    def local_rank(self) -> int:
        return self.group.rank

    def node_rank(self) -> int:
        return 0


class LossScaling(MixedPrecision):
    """The gradient scaler of Lightning's fp16-mixed without its autocast region.

    That one casts a weight anew at each use, and fp16-true has none.
    """

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Nothing: the step brings the loop's region."""
        yield


class _Interruptible:
    """Undo what Lightning makes of Ctrl-C: SystemExit(1), and SIGINT ignored from then on."""

    def __enter__(self) -> None:
        self.handler = signal.getsignal(signal.SIGINT)

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
            signal.signal(signal.SIGINT, self.handler)
            raise KeyboardInterrupt from None
