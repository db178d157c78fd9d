"""RecTools' SASRecModel with its full softmax, driven as its documentation does.

Runs in an interpreter with `rectools[torch]` and without this project. `padding-mask` is its option
of that name.
"""

import math
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytorch_lightning as lightning
import rectools
import torch
from desk import BATCH, BLOCKS, DROPOUT, HEADS, LENGTH, TOP_K, WIDTH, Desk, Split, windows
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel
from rectools.models.nn.item_net import IdEmbeddingsItemNet


class AtTheDesk(lightning.Callback):
    """Waits for commands before the first step and after each that ends a command."""

    def __init__(self, desk: Desk):
        self.desk = desk
        self.owner: SASRecModel | None = None

    def __deepcopy__(self, memo):
        return self  # RecTools fits with a copy of the trainer; the desk is one

    def on_train_start(self, trainer, module):
        self.owner.is_fitted = module.is_fitted = True  # so that it ranks while it trains
        parameters = sum(p.numel() for p in module.parameters())
        self.desk.about["parameters"] = parameters
        trainer.should_stop = not self.desk.begin()
        module.train()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if not self.desk.step_done(int((batch["y"] > 0).sum())):
            trainer.should_stop = True
        module.train()


def main(folder: Path, seed: int, variant: str) -> None:
    warnings.filterwarnings("ignore")
    lightning.seed_everything(seed, verbose=False)
    split = Split(folder)
    train_rows = windows(split.histories(2))
    about = {
        "version": f"rectools {rectools.__version__}",
        "digest": split.digest,
        "targets": sum(len(row) - 1 for row in train_rows),
        "steps_per_epoch": math.ceil(len(train_rows) / BATCH),
    }

    def top(held_out: int) -> np.ndarray:
        dataset = as_dataset(split.histories(held_out))
        users = np.arange(len(split.offsets) - 1)
        found = model.recommend(users, dataset, k=TOP_K, filter_viewed=True)
        best = np.zeros((len(users), TOP_K), dtype=np.int64)
        best[found[Columns.User], found[Columns.Rank] - 1] = found[Columns.Item]
        return best

    waiting = AtTheDesk(Desk(top, about))

    def trainer() -> lightning.Trainer:
        return lightning.Trainer(
            max_epochs=-1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[waiting],
        )

    model = SASRecModel(
        n_blocks=BLOCKS,
        n_heads=HEADS,
        n_factors=WIDTH,
        dropout_rate=DROPOUT,
        session_max_len=LENGTH,
        loss="softmax",
        lr=1e-3,
        batch_size=BATCH,
        use_key_padding_mask=variant == "padding-mask",
        item_net_block_types=(IdEmbeddingsItemNet,),
        get_trainer_func=trainer,
    )
    waiting.owner = model
    model.fit(as_dataset(split.histories(2)))


def as_dataset(histories: list[np.ndarray]) -> Dataset:
    """Interactions whose times keep the order of the rows."""
    lengths = [len(row) for row in histories]
    frame = pd.DataFrame(
        {
            Columns.User: np.repeat(np.arange(len(histories)), lengths),
            Columns.Item: np.concatenate(histories),
            Columns.Weight: 1.0,
            Columns.Datetime: pd.to_datetime(np.arange(sum(lengths)), unit="s"),
        }
    )
    return Dataset.construct(frame)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
