"""The iLoRA teacher: prompts with projected item embeddings -> gated frozen backbone -> item head;
its training.

Shapes: R rows of a batch, L tokens of a row, M = R·L, S samples (answers), I item slots, G gates, H
backbone width, D SASRec width, V items, C candidates of the training softmax.
"""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from core import ilora, item_scores, last_layer, llm
from core.compiling import Execution
from core.config import InputError
from core.loop import autocast, delivered, loader
from core.observe import Observer, parameter_dtypes
from core.plan import GatedPrompts
from core.prompts import Pieces, gate_queries, prompts_of, visible
from core.ranking import Queries, Scorer
from core.reverse import decayed_lambda, reverse_loss
from core.sasrec import SASRec
from core.settings import Settings
from core.states import States


class Teacher(nn.Module):
    """Frozen backbone with gated LoRA, frozen SASRec, trainable router, projector and item head."""

    def __init__(self, settings: Settings, encoder: SASRec, device: torch.device):
        super().__init__()
        teacher, precision = settings.teacher, settings.train.precision
        backbone = llm.load_backbone(teacher, precision, device, settings.seed)
        # Building the backbone draws numbers, a quantised one more than a dense one: what is
        # trained, and the training after it, must start alike in both.
        torch.manual_seed(settings.seed)
        self.fingerprint = llm.fingerprint(teacher, backbone, precision)
        # Not the layers' width: some backbones project from and to another one at their ends.
        self.width = width = backbone.get_input_embeddings().embedding_dim
        table = encoder.item_table.weight
        self.use_cache = teacher.use_cache
        self.adapters = teacher
        self.item_token_dropout = teacher.item_token_dropout
        self.gate = ilora.RankGate()
        self.checkpointing_by = ilora.recompute_layers(backbone, teacher, self.gate)
        self.backbone = ilora.add_adapters(backbone, teacher, self.gate)
        self.reads_out_only = last_layer.read_out_only(self.backbone, self.gate)
        self.adapted = ilora.adapted_layers(self.backbone)
        # A list keeps the frozen encoder out of parameters(), state_dict() and train().
        self._encoder = [encoder.to(device).eval().requires_grad_(False)]
        self.router = ilora.build_router(teacher, table.shape[1])
        self.projector = nn.Sequential(
            nn.Linear(table.shape[1], width), nn.GELU(), nn.Linear(width, width)
        )
        if teacher.use_item_embeddings_head:
            # A copy: the table is trained, the encoder's is not.
            self.item_table = nn.Parameter(table.detach().clone())
            self.register_buffer("item_table_start", table.detach().clone(), persistent=False)
        else:
            self.head = nn.Linear(width, len(table))
        self.to(device)
        if precision.endswith("-true"):
            # All but the router: a half-precision softmax does not sum to one.
            routed = set(self.router.parameters())
            for parameter in set(self.trainable()) - routed:
                parameter.data = parameter.data.to(llm.WEIGHT_DTYPES[precision])
        self.cache = None
        self.states = States()
        one_shape = settings.data.batching == "packed"
        backbone = self.backbone.get_base_model()
        self.execution = Execution(backbone, settings.train.compile, one_shape)
        self._after_forward = {"gate_calls": 0, "first_layer_calls": 0}
        self._bound: tuple[Tensor, dict[str, int]] | None = None

    @property
    def encoder(self) -> SASRec:
        """The frozen SASRec that drives the gate and the item tokens."""
        return self._encoder[0]

    def trainable(self) -> list[nn.Parameter]:
        """Parameters the optimizer gets."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def read_out(self, batch: dict, observer: Observer | None = None) -> Tensor:
        """State behind each answer, (S, H). The gate factors stay bound through a checkpointed
        backward.
        """
        most = self.backbone.config.max_position_embeddings
        if (longest := batch["lengths"].max()) > most:
            raise InputError(
                f"teacher.max_history: a prompt of {longest} tokens; this backbone takes "
                f"at most {most}: lower teacher.max_history or teacher.max_title_tokens"
            )
        self.execution.first_layer_calls = 0
        self.gate.count_anew()
        embed = self.backbone.get_input_embeddings()
        embeds_RLH = embed(batch["ids"]).detach()
        vectors = self.encoder.item_table.weight[batch["slot_items"]]
        if self.training and self.item_token_dropout:
            shown = torch.rand(len(vectors), 1, device=vectors.device) >= self.item_token_dropout
            vectors = vectors * shown
        slots_IH = self.project(vectors).to(embeds_RLH.dtype)
        embeds_RLH = (
            embeds_RLH.flatten(0, 1)
            .index_copy(0, batch["slot_positions"], slots_IH)
            .view_as(embeds_RLH)
        )
        gate_GK = ilora.gate_weights(self.router, batch["states"])
        gate_rows_M, rows_S = batch["gate_rows"], batch["readout"]
        gate_rows = torch.cat([gate_rows_M, gate_rows_M[rows_S]])
        factors = ilora.token_factors(gate_GK, gate_rows, self.adapters).to(embeds_RLH.dtype)
        factors_MR, factors_SR = factors.split([len(gate_rows_M), len(rows_S)])
        ilora.round_adapters(self.adapted, self._rounded_to(embeds_RLH))
        watch = (observer or Observer()).backbone()
        behind = (rows_S, factors_SR) if self.reads_out_only else ()
        with watch, self.gate.bound(factors_MR, *behind):
            hidden = self.last_hidden(embeds_RLH, batch["layout"])
        counts = {"prompts": batch["prompts"], "tokens": batch["own_tokens"]}
        self._bound = factors_MR.detach(), counts | {"answers": len(batch["readout"])}
        self._after_forward = {
            "gate_calls": self.gate.calls,
            "first_layer_calls": self.execution.first_layer_calls,
        }
        return hidden if self.reads_out_only else last_layer.of(hidden, rows_S)

    def _rounded_to(self, embeds_RLH: Tensor) -> torch.dtype | None:
        """The dtype autocast would give fp32 adapters; compiled code rounds them itself."""
        kind = embeds_RLH.device.type
        if self.execution.mode != "off" or not torch.is_autocast_enabled(kind):
            return None
        return torch.get_autocast_dtype(kind)

    def last_hidden(self, embeds_RLH: Tensor, layout: Tensor | None = None) -> Tensor:
        """Last hidden states of the backbone, (R, L, H); (S, H) where the gate is bound with tokens
        to read out. Without a layout each row is one prompt.

        A cache it writes lives until the next forward has ended, as it does with whoever binds the
        outputs to a name.
        """
        masked = {}
        if layout is not None:
            mask = visible(layout)
            if self.backbone.config._attn_implementation == "eager":  # adds it to the scores
                hidden = torch.finfo(embeds_RLH.dtype).min
                mask = torch.zeros_like(mask, dtype=embeds_RLH.dtype).masked_fill(~mask, hidden)
            masked = {"attention_mask": mask, "position_ids": layout[1].long()}
        output = self.backbone(inputs_embeds=embeds_RLH, use_cache=self.use_cache, **masked)
        self.cache = output.past_key_values
        return output.last_hidden_state

    def project(self, vectors_ND: Tensor) -> Tensor:
        """Item vectors to backbone width, (N, H); scaled like SASRec's own input."""
        weight = self.projector[0].weight
        return self.projector(vectors_ND.to(weight.dtype) * vectors_ND.shape[-1] ** 0.5)

    def items(self, chosen_C: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """What states are scored against: vectors (C, H) and biases (C,), if any, of chosen items
        or of all, V+1 with padding first.
        """
        if hasattr(self, "head"):
            weight, bias = self.head.weight, self.head.bias
            return (weight, bias) if chosen_C is None else (weight[chosen_C], bias[chosen_C])
        table = self.item_table if chosen_C is None else self.item_table[chosen_C]
        return self.project(table), None

    def scores(self, state_BH: Tensor, candidates_C: Tensor | None = None) -> Tensor:
        """Item scores in fp32: (B, C) for candidates, else (B, V+1) with column 0 = padding."""
        return item_scores.score(state_BH, *self.items(candidates_C))

    def reverse_distance(self, kind: str) -> Tensor | None:
        """D(E, E0) of the trainable item table; None with the random head."""
        if hasattr(self, "head"):
            return None
        return reverse_loss(kind, self.item_table, self.item_table_start)

    def gate_use(self) -> dict[str, int] | None:
        """Of the last `read_out`: prompts, tokens, answers; and, read off the factors that were
        bound, gates that differ and tokens that have one.
        """
        if self._bound is None:
            return None
        factors_MR, counts = self._bound
        gated_MR = factors_MR[factors_MR.any(1)]
        return counts | {"gates": len(gated_MR.unique(dim=0)), "gated_tokens": len(gated_MR)}

    def call_counts(self) -> dict[str, dict[str, int]]:
        """Calls since the last `read_out` began: gated layers and the first layer's inside, also
        after backward.

        A layer that is recomputed in backward runs its inside once more.
        """
        return {
            "gate": {
                "forward": self._after_forward["gate_calls"],
                "after_backward": self.gate.calls,
            },
            "first_layer": {
                "forward": self._after_forward["first_layer_calls"],
                "after_backward": self.execution.first_layer_calls,
            },
        }


def training_loss(
    teacher: Teacher, batch: dict, settings: Settings, reverse_weight: float, observer: Observer
) -> Tensor:
    """Softmax over the candidates plus weighted reverse distillation (scalar, fp32).

    Candidates: the whole catalogue if it has at most `train_candidates` items, else the batch's
    targets and uniform negatives, duplicates removed. Of a batch that several processes share, the
    loss of the own rows, weighted.
    """
    state_BH = teacher.read_out(batch, observer)
    targets_B = batch["targets"]
    items = len(teacher.encoder.item_table.weight) - 1
    if items <= settings.teacher.train_candidates:
        vectors, bias = teacher.items()
        # Without padding, which is no candidate.
        vectors, bias, labels = vectors[1:], None if bias is None else bias[1:], targets_B - 1
    else:
        others = batch.get("all_targets", targets_B)
        extra = max(settings.teacher.train_candidates - len(others), 0)
        drawn = torch.randint(1, items + 1, (extra,), device=targets_B.device)
        candidates_C = torch.cat([others, drawn])
        # Of an item drawn twice one column counts. Which one, a table says: to make the candidates
        # unique would mean to ask the device how many there are.
        columns_C = torch.arange(len(candidates_C), device=candidates_C.device)
        column_V = torch.empty(items + 1, dtype=torch.long, device=candidates_C.device)
        column_V[candidates_C] = columns_C
        (vectors, bias), labels = teacher.items(candidates_C), column_V[targets_B]
        bias = torch.zeros_like(columns_C, dtype=torch.float32) if bias is None else bias.float()
        bias = bias.masked_fill(column_V[candidates_C] != columns_C, float("-inf"))
    loss = item_scores.cross_entropy(state_BH, vectors, bias, labels)
    if "weight" in batch:
        loss = loss * batch["weight"]
    distance = teacher.reverse_distance(settings.teacher.distill_loss_type)
    if distance is None or reverse_weight == 0.0:
        return loss
    return loss + reverse_weight * distance


def reverse_weight(settings: Settings, optimizer_steps: int, total_steps: int) -> float:
    """λ(t) of reverse distillation after some optimizer steps."""
    teacher = settings.teacher
    steps = teacher.distill_decay_steps or total_steps
    return decayed_lambda(
        teacher.distill_decay_type,
        teacher.distill_lambda,
        teacher.distill_min_lambda,
        optimizer_steps,
        steps,
    )


def scorer(teacher: Teacher, pieces: Pieces, settings: Settings, observer: Observer) -> Scorer:
    """Full-catalogue scores after each history, (B, V+1) fp32, in batches of
    `inference_batch_size` or less.
    """

    def score(queries: Queries) -> Iterator[tuple[np.ndarray, Tensor]]:
        for batch, _, scores_BV in infer(teacher, pieces, queries, settings, observer):
            yield batch["rows"].numpy(), scores_BV

    return score


@torch.inference_mode()
def infer(
    teacher: Teacher,
    pieces: Pieces,
    queries: Queries,
    settings: Settings,
    observer: Observer,
    rows: np.ndarray | None = None,
) -> Iterator[tuple[dict, Tensor, Tensor]]:
    """Run the queries: batches with read-out states (S, H) and scores (S, V+1), fp32; a batch with
    more scores than the budget of `core.item_scores` comes in parts. With `rows` the prompts that
    answer these rows, whatever else they answer.

    The batch's rows are on the host, everything else where the teacher is.
    """
    teacher.eval()
    device = teacher.projector[0].weight.device
    asked = prompts_of(queries, settings.teacher.max_history, settings.teacher.mode)
    if rows is not None:
        asked = asked.that_answer(rows)
    batches = GatedPrompts(
        teacher.states.of(teacher.encoder, gate_queries(asked)),
        pieces,
        asked,
        settings.teacher.inference_batch_size,
        batching=settings.data.batching,
    )
    with autocast(settings.train.precision, device):
        items = teacher.items()  # of fixed weights: once for all batches
    source = delivered(loader(batches, settings.train.num_workers, device), observer, device)
    for index, batch in enumerate(source):
        observer.loader_processes()
        with observer.first_step(), autocast(settings.train.precision, device):
            state_SH = teacher.read_out(batch, observer)
            parts = item_scores.in_parts(state_SH, *items)
            first = next(parts)
        observer.largest("largest_batch", batch["prompts"])
        observer.batch(batch)
        observer.counts.update(
            inference_tokens=batch["tokens"], inference_padded_tokens=batch["padded_tokens"]
        )
        answered = torch.from_numpy(batches.rows(index))
        for part, scores_RV in itertools.chain([first], parts):
            own = {"rows": answered[part], "targets": batch["targets"][part]}
            yield batch | own | {"samples": len(scores_RV)}, state_SH[part].float(), scores_RV


@torch.inference_mode()
def item_embeddings(teacher: Teacher, pieces: Pieces, batch_size: int = 256) -> np.ndarray:
    """The backbone's own view of each title, without adapters: mean last state over its tokens,
    (V+1, H) fp32.
    """
    teacher.eval()
    embed = teacher.backbone.get_input_embeddings()
    device = embed.weight.device
    found = np.zeros((len(pieces.lengths), teacher.width), dtype=np.float32)
    for start in range(1, len(found), batch_size):
        items = np.arange(start, min(start + batch_size, len(found)))
        lengths = pieces.lengths[items] - 1  # without the slot token
        columns = np.arange(max(1, lengths.max()))
        real = columns < lengths[:, None]
        ids = np.where(
            real, pieces.tokens[np.where(real, pieces.starts[items][:, None] + columns, 0)], 0
        )
        with teacher.backbone.disable_adapter(), teacher.execution.any_shape():
            embeds = embed(torch.from_numpy(ids.astype(np.int64)).to(device))
            hidden = teacher.last_hidden(embeds).float().cpu()
        weight = torch.from_numpy(real / np.maximum(lengths, 1)[:, None]).float()
        found[items] = torch.einsum("ilh,il->ih", hidden, weight).numpy()
    return found


def describe(teacher: Teacher, observer: Observer) -> None:
    """Facts of the built model: what is adapted, how it is held, which attention it will run."""
    adapted = teacher.adapted
    frozen = [p for p in teacher.parameters() if not p.requires_grad]
    config = teacher.backbone.config
    observer.facts.update(
        attn_implementation=config._attn_implementation,
        param_dtypes=parameter_dtypes(teacher),
        layers_adapted=len(adapted),
        layers_4bit=len(llm.four_bit_layers(teacher.backbone)),
        layers_float8=len(llm.float8_layers(teacher.backbone)),
        adapted_4bit=sum(len(llm.four_bit_layers(layer.base_layer)) for layer in adapted),
        gradient_checkpointing_by=teacher.checkpointing_by,
        frozen_bytes=sum(p.numel() * p.element_size() for p in frozen),
        trainable_parameters=sum(p.numel() for p in teacher.trainable()),
    )
    observer.probes.update(
        gate_calls=lambda: teacher.call_counts()["gate"]["forward"],
        gate_use=teacher.gate_use,
        checkpoint_calls=lambda: teacher.call_counts()["first_layer"],
        training=lambda: all(module.training for module in teacher.modules()),
        cache=lambda: _cache_use(teacher, observer),
    )
    if observer.facts["layers_4bit"]:
        observer.probes["quant"] = lambda: llm.quantisation(teacher.backbone)
    teacher.backbone.register_forward_pre_hook(observer.backbone_call, with_kwargs=True)


def _cache_use(teacher: Teacher, observer: Observer) -> dict | None:
    """The cache that the last forward left alive, if any, and whether one was ever read."""
    if teacher.cache is None:
        return None
    return {"written_bytes": llm.cache_bytes(teacher.cache), "read": observer.cache_read}
