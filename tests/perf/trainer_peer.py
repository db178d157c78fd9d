"""The peer: Hugging Face `Trainer` with peft's plain LoRA, as it comes and tuned.

The same classifier on the same prompts: item slots filled by the projector, the last token's state
against all items. As it comes: a causal language model, which makes logits and hidden states of all
tokens, batches in random order padded to their longest row. Tuned: the backbone without its head,
and this project's own batches, so that both sides pad alike.

Shapes: B rows, T tokens, S item slots, H backbone width, V items.
"""

import copy
import tempfile
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from core import llm
from core.teacher import Teacher
from perf.old_way import with_head
from perf.timing import Steady
from perf.world import World


class Peer(nn.Module):
    """A classifier over items that `Trainer` can train: returns its loss."""

    def __init__(self, world: World, now: Teacher, tuned: bool):
        super().__init__()
        given = world.settings.teacher
        backbone = llm.load_backbone(given, world.precision, world.on, world.settings.seed)
        self.tuned, model = tuned, backbone
        if not tuned:
            model = with_head(backbone, backbone)
            model.requires_grad_(False)
        config = LoraConfig(
            r=given.lora_r,
            lora_alpha=given.lora_alpha,
            lora_dropout=given.lora_dropout,
            target_modules=list(given.target_modules),
        )
        self.model = get_peft_model(model, config)
        adapters = {_short(name): p for name, p in now.backbone.named_parameters()}
        for name, parameter in self.model.named_parameters():
            if "lora_" in name:
                parameter.data.copy_(adapters[_short(name)].data)
        self.projector = copy.deepcopy(now.projector)
        self.item_table = nn.Parameter(now.item_table.detach().clone())
        # A list keeps the frozen table out of the parameters.
        self._shown = [now.encoder.item_table.weight]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        slot_positions: Tensor,
        slot_items: Tensor,
        labels: Tensor,
    ) -> dict[str, Tensor]:
        """Mean cross-entropy over all items under `loss`."""
        embeds_BTH = self.model.get_input_embeddings()(input_ids)
        slots_SH = self._project(self._shown[0][slot_items]).to(embeds_BTH.dtype)
        flat = embeds_BTH.flatten(0, 1).index_copy(0, slot_positions, slots_SH)
        given = {
            "inputs_embeds": flat.view_as(embeds_BTH),
            "attention_mask": attention_mask,
            "use_cache": False,
        }
        if self.tuned:
            hidden_BTH = self.model(**given).last_hidden_state
        else:
            hidden_BTH = self.model(**given, output_hidden_states=True).hidden_states[-1]
        last_BH = hidden_BTH[
            torch.arange(len(labels), device=labels.device), attention_mask.sum(1) - 1
        ]
        scores_BV1 = last_BH @ self._project(self.item_table).t()
        return {"loss": F.cross_entropy(scores_BV1[:, 1:].float(), labels - 1)}

    def _project(self, vectors_ND: Tensor) -> Tensor:
        return self.projector(vectors_ND * vectors_ND.shape[-1] ** 0.5)

    def gradients(self) -> dict[str, Tensor]:
        """Gradients by the names of the present teacher's parameters."""
        return {_short(name): p.grad for name, p in self.named_parameters() if p.grad is not None}


def _short(name: str) -> str:
    for prefix in ("model.", "base_model.model.", "model."):
        name = name.removeprefix(prefix)
    return name


def examples(world: World) -> list[dict]:
    """The step's samples, tokenised beforehand, one dictionary each."""
    pieces, queries, found = world.pieces, world.queries, []
    for row in world.rows:
        start, end = int(queries.starts[row]), int(queries.ends[row])
        items = queries.items[max(start, end - world.max_history) : end]
        shown = [pieces.tokens[pieces.starts[i] : pieces.starts[i] + pieces.lengths[i]] for i in
                 items]  # fmt: skip
        lengths = np.cumsum([len(piece) for piece in shown])
        found.append(
            {
                "input_ids": np.concatenate([pieces.instruction, *shown, pieces.cue]),
                "slots": len(pieces.instruction) + lengths - 1,
                "items": items,
                "label": int(queries.items[end]),
            }
        )
    return found


def collate(rows: list[dict]) -> dict[str, Tensor]:
    """A batch padded to its longest row."""
    width = max(len(row["input_ids"]) for row in rows)
    ids = np.zeros((len(rows), width), dtype=np.int64)
    mask = np.zeros_like(ids)
    for line, row in enumerate(rows):
        ids[line, : len(row["input_ids"])] = row["input_ids"]
        mask[line, : len(row["input_ids"])] = 1
    slots = np.concatenate([line * width + row["slots"] for line, row in enumerate(rows)])
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask),
        "slot_positions": torch.from_numpy(slots),
        "slot_items": torch.from_numpy(np.concatenate([row["items"] for row in rows]).astype(int)),
        "labels": torch.tensor([row["label"] for row in rows]),
    }


class Planned(Trainer):
    """A Trainer whose batches are given."""

    plan: list[list[int]]

    def get_train_dataloader(self) -> DataLoader:
        """The batches of the plan, in its order."""
        return DataLoader(self.train_dataset, batch_sampler=self.plan, collate_fn=collate)


class Clock(TrainerCallback):
    """The time at the end of each step."""

    def __init__(self, clock: Callable[[], float]):
        self.clock = clock
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Called by the Trainer."""
        self.ends.append(self.clock())


def plan_of(world: World, now: Teacher) -> list[list[int]]:
    """This project's own batches of the samples, as places in the list of examples."""
    return [[int(row) for row in rows] for rows in world.batches(now).plan.batches]


def training(world: World, peer: Peer, plan: list[list[int]] | None) -> Callable[[], Steady]:
    """Two epochs; the seconds of the second, an optimizer step for each batch. `plan`: the batches,
    else the Trainer's own.
    """
    rows = examples(world)

    def run() -> Steady:
        with tempfile.TemporaryDirectory() as folder:
            options = TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=world.batch_size,
                num_train_epochs=2,
                learning_rate=1e-30,
                weight_decay=0.0,
                max_grad_norm=1.0,
                use_cpu=world.on.type == "cpu",
                bf16=world.precision == "bf16-mixed",
                report_to=[],
                save_strategy="no",
                logging_strategy="no" if plan else "steps",
                disable_tqdm=True,
                remove_unused_columns=False,
            )
            clock = Clock(world.clock)
            kind = Planned if plan else Trainer
            trainer = kind(
                model=peer,
                args=options,
                train_dataset=rows,
                data_collator=collate,
                callbacks=[clock],
            )
            if plan:
                trainer.plan = plan
            trainer.train()
        half = len(clock.ends) // 2
        return Steady(clock.ends[-1] - clock.ends[half - 1])

    return run
