"""RePlay's SasRec with its full softmax, driven as its documentation does: Parquet files, default
transforms, its Lightning module.

Runs in an interpreter with `replay-rec` and without this project. Of what RePlay ships for speed
`trimmed` has trimmed batches, `bucket` also rows in buckets of like length.
"""

import math
import sys
import tempfile
import warnings
from pathlib import Path

import lightning
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import replay
import torch
from desk import BATCH, BLOCKS, DROPOUT, HEADS, LENGTH, TOP_K, WIDTH, Desk, Split, windows
from replay.data import FeatureHint, FeatureSource, FeatureType
from replay.data.nn import ParquetModule, TensorFeatureInfo, TensorFeatureSource, TensorSchema
from replay.nn.lightning import LightningModule
from replay.nn.lightning.callback import TorchTopItemsCallback
from replay.nn.lightning.optimizer import OptimizerFactory
from replay.nn.lightning.postprocessor import SeenItemsFilter
from replay.nn.sequential.length_bucket import LengthBucketedQueryEncoder
from replay.nn.sequential.sasrec import SasRec
from replay.nn.transform import AdaptiveTrimTransform, TargetAwareAdaptiveTrimTransform
from replay.nn.transform.template import make_default_sasrec_transforms

BUCKET = 16


class AtTheDesk(lightning.Callback):
    """Waits for commands before the first step and after each that ends a command."""

    def __init__(self, desk: Desk):
        self.desk = desk

    def on_train_start(self, trainer, module):
        trainer.should_stop = not self.desk.begin()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if not self.desk.step_done(int(batch["target_padding_mask"].sum())):
            trainer.should_stop = True


def main(folder: Path, seed: int, variant: str, precision: str) -> None:
    trimmed, bucket = variant in ("trimmed", "bucket"), variant == "bucket"
    warnings.filterwarnings("ignore")
    lightning.seed_everything(seed, verbose=False)
    split, work = Split(folder), Path(tempfile.mkdtemp())
    items = split.num_items
    info = TensorFeatureInfo(
        "item_id",
        is_seq=True,
        feature_type=FeatureType.CATEGORICAL,
        embedding_dim=WIDTH,
        padding_value=items,
        cardinality=items,
        feature_hint=FeatureHint.ITEM_ID,
        feature_sources=[TensorFeatureSource(FeatureSource.INTERACTIONS, "item_id")],
    )
    schema = TensorSchema([info])
    train_rows = [row - 1 for row in windows(split.histories(2))]
    longest = int(np.diff(split.offsets).max())
    write(work / "train.parquet", train_rows, LENGTH + 1)
    for held_out in (1, 2):
        rows = [row - 1 for row in split.histories(held_out)]
        write(work / f"predict{held_out}.parquet", rows, LENGTH, seen=rows)

    def metadata(length: int) -> dict:
        return {"item_id": {"shape": length, "padding": items}}

    predicting = metadata(LENGTH) | {"seen_ids": {"shape": longest, "padding": items}}
    predicting |= {"user_id": {}}
    transforms = make_default_sasrec_transforms(schema)
    if trimmed:
        names = ["item_id", "positive_labels"]
        transforms["train"].insert(2, TargetAwareAdaptiveTrimTransform(names))
        transforms["predict"].insert(1, AdaptiveTrimTransform("item_id"))
    model = SasRec.from_params(
        schema, WIDTH, HEADS, BLOCKS, max_sequence_length=LENGTH, dropout=DROPOUT
    )
    if bucket:
        model.body.encoder = LengthBucketedQueryEncoder(model.body.encoder, BUCKET)
    module = LightningModule(model, OptimizerFactory(learning_rate=1e-3))
    options = {
        "accelerator": "cpu",
        "precision": {"fp32": "32-true"}.get(precision, precision),
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }

    def top(held_out: int) -> np.ndarray:
        best = TorchTopItemsCallback(TOP_K, "user_id", [SeenItemsFilter(items)])
        data = ParquetModule(
            BATCH,
            {"predict": predicting},
            {"predict": transforms["predict"]},
            predict_path=str(work / f"predict{held_out}.parquet"),
        )
        training = module.trainer  # ranking has a trainer of its own
        trainer = lightning.Trainer(callbacks=[best], inference_mode=True, **options)
        trainer.predict(module, data, return_predictions=False)
        module.trainer = training
        module.train()
        users, ids, _ = best.get_result()
        ordered = np.empty((len(users), TOP_K), dtype=np.int64)
        ordered[users.numpy()] = ids.numpy() + 1
        return ordered

    about = {
        "version": f"replay-rec {replay.__version__}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "digest": split.digest,
        "targets": sum(len(row) - 1 for row in train_rows),
        "steps_per_epoch": math.ceil(len(train_rows) / BATCH),
    }
    desk = Desk(top, about)
    data = ParquetModule(
        BATCH,
        {"train": metadata(LENGTH + 1)},
        {"train": transforms["train"]},
        train_path=str(work / "train.parquet"),
    )
    trainer = lightning.Trainer(
        max_epochs=-1,
        limit_val_batches=0,
        callbacks=[AtTheDesk(desk)],
        **options,
    )
    trainer.fit(module, data)


def write(path: Path, rows: list, length: int, seen: list | None = None) -> None:
    """Users' newest items as a Parquet table of lists."""
    columns = {
        "user_id": np.arange(len(rows)),
        "item_id": pa.array([row[-length:].astype(np.int64) for row in rows]),
    }
    if seen is not None:
        columns["seen_ids"] = pa.array([row.astype(np.int64) for row in seen])
    pq.write_table(pa.table(columns), path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
