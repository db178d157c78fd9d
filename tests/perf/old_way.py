"""The teacher's old way, as the users' notes describe it, and the rungs that lead from it to now.

Tidy code that a competent person would write the straightforward way: prompts tokenised and put
together one example after the other, padded to the longest of the split, a causal language model
with its head and all hidden states, LoRA with an expert axis in fp32, the user's SASRec state
inside the step, metrics user by user, a file for each batch of outputs. `Way` takes one of these
back at a time. Weights are those of a `core` teacher, so that both give the same numbers.

Shapes: B users, T tokens, S item slots, H backbone width, D SASRec width, K experts, R ranks, V
items.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from core import llm
from core.prompts import Pieces
from core.ranking import Queries
from core.sasrec import SASRec
from core.settings import Settings, TeacherSettings
from core.teacher import Teacher
from perf.reference import ExpertLoRA


@dataclass(frozen=True)
class Way:
    """How a step is done; as it stands, the notes' way."""

    pad_to_split: bool = True
    """Every row as long as the longest prompt of the split; else of its batch."""
    grouped: bool = False
    """Prompts of like length share a batch."""
    by_index: bool = False
    """Token ids and slots gathered from tables; else tokenised example by example."""
    lm_head: bool = True
    """Logits of every token and all hidden states are made."""
    expert_axis: bool = True
    """Every expert's full output is made; else the gate multiplies the ranks of stock peft."""


RUNGS = {
    "old way": Way(),
    "padded to the batch": Way(False),
    "grouped by length": Way(False, True),
    "assembled by index": Way(False, True, True),
    "no LM head": Way(False, True, True, False),
    "gate in rank space": Way(False, True, True, False, False),
}
"""Each takes one more thing back; ratios of neighbours are what that thing costs."""


class Bound:
    """The gate of the running forward, where the adapted layers find it."""

    def bind(self, gate_BK: Tensor, tokens: int, rank: int) -> None:
        """From here on this gate; `tokens` of each row, all of them, are gated."""
        self.gate_BK, self.tokens, self.rank = gate_BK, tokens, rank
        self.__dict__.pop("factor_MR", None)

    @cached_property
    def factor_MR(self) -> Tensor:
        """K·g_k on the ranks of expert k, a row for each token: peft scales by alpha/R, iLoRA by
        alpha/(R/K).
        """
        experts = self.gate_BK.shape[1]
        factor_BR = (self.gate_BK * experts).repeat_interleave(self.rank // experts, 1)
        return factor_BR[:, None].expand(-1, self.tokens, -1).flatten(0, 1)


class ExpertLinear(nn.Module):
    """Expert-axis LoRA in the place of a linear layer, whether it is called with (B, T, D) or with
    (B·T, D).
    """

    def __init__(self, experts: ExpertLoRA, bound: Bound):
        super().__init__()
        self.experts, self.bound = experts, bound

    def forward(self, x: Tensor) -> Tensor:
        """Output of the layer, shaped like `x` but for the last dimension."""
        gate_BK = self.bound.gate_BK
        y_BTD = self.experts(x.reshape(len(gate_BK), -1, x.shape[-1]), gate_BK)
        return y_BTD.view(*x.shape[:-1], -1)


def expert_axis(backbone: nn.Module, adapted: nn.Module, settings: TeacherSettings, bound: Bound):
    """Give a plain backbone the adapters of an adapted one (`core.ilora`), in expert-axis form."""
    share = settings.lora_r // settings.num_experts
    for name, layer in adapted.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        path = name.removeprefix("base_model.model.")
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        experts = ExpertLoRA(
            backbone.get_submodule(path),
            down.detach().view(-1, share, down.shape[1]).clone(),
            up.detach().view(len(up), -1, share).movedim(1, 0).contiguous(),
            settings.lora_alpha / share,
        )
        parent, _, child = path.rpartition(".")
        setattr(backbone.get_submodule(parent), child, ExpertLinear(experts, bound))
    return backbone


def rank_space(
    backbone: nn.Module, adapted: nn.Module | None, settings: TeacherSettings, bound: Bound
):
    """Stock peft whose `lora_A` outputs a hook multiplies by the gate, K folded into it, as this
    project did before its own variant; weights of an adapted backbone, if given.
    """
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=list(settings.target_modules),
        bias="none",
    )
    model = get_peft_model(backbone, config, autocast_adapter_dtype=False)

    def multiply(module: nn.Module, inputs: tuple, low: Tensor) -> Tensor:
        return low * bound.factor_MR.view_as(low).to(low.dtype)

    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            layer.lora_A["default"].register_forward_hook(multiply)
    if adapted is not None:
        own = dict(model.named_parameters())
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                own[name].data.copy_(parameter.data)
    return model


def with_head(backbone: nn.Module, adapted: nn.Module) -> nn.Module:
    """The causal language model of a backbone: `adapted` in its place, and the head on top."""
    weight = backbone.get_input_embeddings().weight
    with weight.device:
        model = AutoModelForCausalLM.from_config(backbone.config, dtype=weight.dtype)
    model.model = adapted
    model.tie_weights()
    return model


class OldTeacher(nn.Module):
    """A teacher that works one of the old ways with a present teacher's weights."""

    def __init__(
        self,
        now: Teacher,
        settings: Settings,
        tokenizer,
        titles: Sequence[str],
        pieces: Pieces,
        way: Way,
    ):
        super().__init__()
        self.settings, self.way, self.bound = settings, way, Bound()
        self.tokenizer, self.titles, self.pieces = tokenizer, titles, pieces
        self.device = now.projector[0].weight.device
        backbone = llm.load_backbone(
            settings.teacher, settings.train.precision, self.device, settings.seed
        )
        self.embed = backbone.get_input_embeddings()
        adapt = expert_axis if way.expert_axis else rank_space
        adapted = adapt(backbone, now.backbone, settings.teacher, self.bound)
        if way.lm_head:
            self.model = with_head(backbone, adapted)
        else:
            self.model = adapted
        self.model.requires_grad_(False)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_("lora_" in name or "_KRD" in name or "_KDR" in name)
        self._encoder = [now.encoder]  # a list keeps it out of parameters() and train()
        self.router = _copy(now.router)
        self.projector = _copy(now.projector)
        self.item_table = nn.Parameter(now.item_table.detach().clone())
        self.longest = 0

    @property
    def encoder(self) -> SASRec:
        """The frozen SASRec."""
        return self._encoder[0]

    def trainable(self) -> list[nn.Parameter]:
        """Parameters the optimizer gets."""
        return [p for p in self.parameters() if p.requires_grad]

    def batches(self, queries: Queries, rows: np.ndarray, size: int) -> list[np.ndarray]:
        """The batches of an epoch; as the rows come, or by length. Notes the split's longest."""
        shown, _ = queries.newest(np.arange(len(queries)), self.most)
        fixed = len(self.pieces.instruction) + len(self.pieces.cue)
        lengths = self.pieces.lengths[shown].sum(1) + fixed
        self.longest = int(lengths.max())
        if self.way.grouped:
            rows = rows[np.argsort(lengths[rows], kind="stable")]
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    @property
    def most(self) -> int:
        """Items shown at most."""
        return self.settings.teacher.max_history

    def read_out(self, queries: Queries, rows: np.ndarray) -> Tensor:
        """State of each prompt's last token, (B, H)."""
        embeds_BTH, lengths_B = self.embedded(queries, rows)
        gate_BK = self.router(self.user_states(queries, rows).float()).softmax(-1)
        gate_BK = gate_BK.to(embeds_BTH.dtype)
        self.bound.bind(gate_BK, embeds_BTH.shape[1], self.settings.teacher.lora_r)
        mask_BT = (torch.arange(embeds_BTH.shape[1]) < lengths_B[:, None]).long().to(self.device)
        given = {"inputs_embeds": embeds_BTH, "attention_mask": mask_BT, "use_cache": False}
        if self.way.lm_head:
            hidden_BTH = self.model(**given, output_hidden_states=True).hidden_states[-1]
        else:
            hidden_BTH = self.model(**given).last_hidden_state
        return hidden_BTH[torch.arange(len(rows)), lengths_B - 1]

    @torch.no_grad()
    def user_states(self, queries: Queries, rows: np.ndarray) -> Tensor:
        """SASRec states (B, D), from a pass over the histories of this batch."""
        items, lengths = queries.newest(rows, self.encoder.max_length)
        states = self.encoder(self._here(items))
        return states[torch.arange(len(rows)), torch.from_numpy(lengths - 1)]

    def embedded(self, queries: Queries, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Input embeddings (B, T, H), item slots filled, and lengths (B,)."""
        if self.way.by_index:
            return self._embedded_by_index(queries, rows)
        examples, lengths = [], []
        for row in rows:
            tokens, slots, items = self._prompt(queries, int(row))
            embeds_TH = self.embed(torch.tensor(tokens, device=self.device))
            slots_SH = self.project(self.encoder.item_table.weight[torch.tensor(items)])
            slots_SH = slots_SH.to(embeds_TH.dtype)
            places = torch.tensor(slots, device=self.device)
            embeds_TH = embeds_TH.index_copy(0, places, slots_SH)
            examples.append(embeds_TH)
            lengths.append(len(tokens))
        width = self.longest if self.way.pad_to_split else max(lengths)
        padded = [F.pad(example, (0, 0, 0, width - len(example))) for example in examples]
        return torch.stack(padded), torch.tensor(lengths)

    def _prompt(self, queries: Queries, row: int) -> tuple[list[int], list[int], list[int]]:
        """Token ids of one prompt, positions of its item slots, and their items."""
        start, end = int(queries.starts[row]), int(queries.ends[row])
        items = [int(item) for item in queries.items[max(start, end - self.most) : end]]
        tokens, slots = self.pieces.instruction.tolist(), []
        for item in items:
            title = self.tokenizer(" " + self.titles[item], add_special_tokens=False)["input_ids"]
            tokens += title[: self.settings.teacher.max_title_tokens]
            slots.append(len(tokens))
            tokens.append(self.tokenizer.eos_token_id)
        return tokens + self.pieces.cue.tolist(), slots, items

    def _embedded_by_index(self, queries: Queries, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        pieces = self.pieces
        shown, _ = queries.newest(rows, self.most)
        columns = np.arange(pieces.lengths.max())
        real_RLT = columns < pieces.lengths[shown][..., None]
        tokens_RLT = pieces.tokens[np.where(real_RLT, pieces.starts[shown][..., None] + columns, 0)]
        history = real_RLT.sum((1, 2))
        begin, after = len(pieces.instruction), len(pieces.cue)
        lengths = begin + history + after
        ids = np.zeros((len(rows), lengths.max()), dtype=np.int64)
        ids[:, :begin] = pieces.instruction
        place = np.arange(ids.shape[1]) - begin
        ids[(place >= 0) & (place < history[:, None])] = tokens_RLT[real_RLT]
        behind = place - history[:, None]
        cue = (behind >= 0) & (behind < after)
        ids[cue] = np.tile(pieces.cue, len(rows))
        ends = begin + np.cumsum(pieces.lengths[shown], 1) - 1
        slots = (np.arange(len(rows))[:, None] * ids.shape[1] + ends)[shown > 0]
        embeds_BTH = self.embed(self._here(ids))
        slots_SH = self.project(self.encoder.item_table.weight[self._here(shown[shown > 0])])
        slots_SH = slots_SH.to(embeds_BTH.dtype)
        flat = embeds_BTH.flatten(0, 1).index_copy(0, self._here(slots), slots_SH)
        return flat.view_as(embeds_BTH), torch.from_numpy(lengths)

    def _here(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device)

    def project(self, vectors_ND: Tensor) -> Tensor:
        """Item vectors to backbone width, (N, H)."""
        return self.projector(vectors_ND * vectors_ND.shape[-1] ** 0.5)

    def scores(self, state_BH: Tensor) -> Tensor:
        """Scores of all items, (B, V+1)."""
        return state_BH @ self.project(self.item_table).t()

    def loss(self, queries: Queries, rows: np.ndarray) -> Tensor:
        """Mean cross-entropy over all items."""
        targets_B = self._here(queries.targets[rows])
        scores_BV1 = self.scores(self.read_out(queries, rows))
        return F.cross_entropy(scores_BV1[:, 1:].float(), targets_B - 1)

    def accumulate(self, queries: Queries, rows: np.ndarray, size: int) -> float:
        """Gradients of the mean loss of the rows, in batches; the loss."""
        total = 0.0
        for chosen in self.batches(queries, rows, size):
            loss = self.loss(queries, chosen) * (len(chosen) / len(rows))
            loss.backward()
            total += loss.item()
        return total

    def gradients(self) -> dict[str, Tensor]:
        """Gradients by the names and in the shapes of the present teacher's parameters."""
        found = {}
        for name, parameter in self.named_parameters():
            if parameter.grad is None:
                continue
            name = name.removeprefix("model.").removeprefix("model.")
            name = name.removeprefix("base_model.model.")
            gradient = parameter.grad
            if name.endswith("experts.down_KRD"):
                name, gradient = name[:-16] + "lora_A.default.weight", gradient.flatten(0, 1)
            elif name.endswith("experts.up_KDR"):
                name, gradient = name[:-14] + "lora_B.default.weight", gradient.movedim(0, 1)
                gradient = gradient.flatten(1, 2)
            found[name] = gradient
        return found

    @torch.no_grad()
    def answer(self, queries: Queries, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Read-out states (B, H) and scores (B, V+1)."""
        state_BH = self.read_out(queries, rows)
        return state_BH.float().cpu(), self.scores(state_BH).float().cpu()

    def evaluate(self, queries: Queries, size: int, cutoffs: Sequence[int]) -> dict[str, float]:
        """recall@k and ndcg@k, user after user."""
        places: list[int] = []
        for rows in self.batches(queries, np.arange(len(queries)), size):
            _, scores_BV1 = self.answer(queries, rows)
            places += [
                place_of_target(scores_V1, queries, int(row), max(cutoffs))
                for scores_V1, row in zip(scores_BV1, rows, strict=True)
            ]
        return metrics_of(places, cutoffs)

    def write_outputs(self, queries: Queries, size: int, folder: Path) -> None:
        """Scores and states of every query, a file for each batch."""
        folder.mkdir(parents=True, exist_ok=True)
        for number, rows in enumerate(self.batches(queries, np.arange(len(queries)), size)):
            state_BH, scores_BV1 = self.answer(queries, rows)
            found = {"ids": torch.from_numpy(rows), "scores": scores_BV1, "embedding": state_BH}
            torch.save(found, folder / f"batch_{number}.pt")


def _copy(module: nn.Module) -> nn.Module:
    """A module of its own with the same weights and no gradients."""
    found = copy.deepcopy(module)
    found.zero_grad(set_to_none=True)
    return found


# ---- ranking, user after user ----


def place_of_target(scores_V1: Tensor, queries: Queries, row: int, most: int) -> int:
    """Place of the target (from 0) among the items not yet seen; `most` where it is no better."""
    start, end = int(queries.starts[row]), int(queries.ends[row])
    target = int(queries.items[end])
    seen = torch.from_numpy(queries.items[start:end].astype(np.int64))
    ranked = scores_V1.clone()
    ranked[seen] = -torch.inf
    ranked[0] = -torch.inf
    ranked[target] = scores_V1[target]
    best = ranked.topk(most).indices
    hit = (best == target).nonzero()
    return int(hit[0]) if len(hit) else most


def rank_by_sorting(
    states_QD: Tensor, table_VD: Tensor, queries: Queries, cutoffs: Sequence[int]
) -> dict[str, float]:
    """Metrics and loss of all queries in a loop over users that sorts each one's items, as most
    published evaluations do.
    """
    places, loss = [], 0.0
    for row, state_D in enumerate(states_QD):
        scores_V1 = table_VD @ state_D
        start, end = int(queries.starts[row]), int(queries.ends[row])
        target = torch.tensor(int(queries.items[end]))
        loss += F.cross_entropy(scores_V1[1:], target - 1).item()
        ranked = scores_V1.clone()
        ranked[torch.from_numpy(queries.items[start:end].astype(np.int64))] = -torch.inf
        ranked[0] = -torch.inf
        ranked[target] = scores_V1[target]
        order = ranked.argsort(descending=True)
        places.append(int((order == target).nonzero()))
    return metrics_of(places, cutoffs) | {"loss": loss / len(places)}


def rank_by_top(
    states_QD: Tensor, table_VD: Tensor, queries: Queries, cutoffs: Sequence[int]
) -> dict[str, float]:
    """Metrics of all queries in a loop over users that looks at the first places only: no ranks
    behind them, no loss.
    """
    places = [
        place_of_target(table_VD @ state_D, queries, row, max(cutoffs))
        for row, state_D in enumerate(states_QD)
    ]
    return metrics_of(places, cutoffs)


def rank_by_lists(
    states_QD: Tensor, table_VD: Tensor, queries: Queries, cutoffs: Sequence[int]
) -> dict[str, float]:
    """Metrics of all queries in a loop over users, Python lists inside."""
    places = []
    for row, state_D in enumerate(states_QD):
        scores = (table_VD @ state_D).tolist()
        start, end = int(queries.starts[row]), int(queries.ends[row])
        target, seen = int(queries.items[end]), set(queries.items[start:end].tolist())
        allowed = [i for i in range(1, len(scores)) if i not in seen or i == target]
        ranked = sorted(allowed, key=lambda item: -scores[item])
        places.append(ranked.index(target))
    return metrics_of(places, cutoffs)


def metrics_of(places: Sequence[int], cutoffs: Sequence[int]) -> dict[str, float]:
    """recall@k and ndcg@k from places counted from 0."""
    users = len(places)
    hits = {k: [place for place in places if place < k] for k in cutoffs}
    return {f"recall@{k}": len(hits[k]) / users for k in cutoffs} | {
        f"ndcg@{k}": sum(1 / float(np.log2(place + 2)) for place in hits[k]) / users
        for k in cutoffs
    }
