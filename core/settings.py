"""Every knob of the pipeline, typed and frozen; no I/O, importable without torch.

Validators only reject combinations, with the reason; no value is derived here, so what a file says
is what runs. Leaf names follow transformers, peft, Lightning and the users' own notes.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticKnownError

Precision = Literal["fp32", "tf32", "bf16-mixed", "bf16-true", "fp16-mixed", "fp16-true", "fp8"]
"""`tf32`: fp32 weights whose matrix products round to TF32; `-mixed`: autocast; `-true`: 16-bit
weights and products; `fp8`: bf16-mixed whose frozen linear layers multiply in float8, scaled tensor
by tensor (torchao; GPUs from capability 8.9 on)."""
StageName = Literal[
    "prepare_data",
    "student_fit",
    "student_test",
    "teacher_fit",
    "teacher_test",
    "teacher_outputs",
    "distill_fit",
    "distill_test",
    "evaluate_all",
]
Batching = Literal["padded", "grouped", "packed"]
Mode = Literal["instance", "causal", "tail"]
Source = Literal["synthetic", "ml-1m", "ml-100k", "ml-latest-small", "ml-latest", "csv", "parquet"]


def _not_zero(limit: int) -> int:
    if limit == 0:
        raise ValueError("0 keeps nothing; -1 means all")
    return limit


Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Limit = Annotated[int, Field(ge=-1), AfterValidator(_not_zero)]
"""A count, or -1 for all."""
NonNegative = Annotated[float, Field(ge=0.0)]
IMAGES = ("host", "cu118", "cu121")


def _image(name: str) -> str:
    if name in IMAGES or re.fullmatch(r"[a-z0-9][\w./-]*(:[\w.-]+|@sha256:[0-9a-f]{64})", name):
        return name
    raise ValueError(
        f"{name} is none of {', '.join(IMAGES)} and no image reference (name:tag or name@sha256:…)"
    )


def _variable(entry: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*=.*", entry, re.DOTALL):
        raise ValueError(f"{entry} is not NAME=value")
    return entry


def _devices(value: Any) -> int | str:
    if isinstance(value, str) and value.isdecimal():  # as a file's text, where text is allowed
        value = int(value)
    if value == "auto" or (type(value) is int and value > 0):
        return value
    raise PydanticKnownError("literal_error", {"expected": "'a whole number above 0', 'auto'"})


Devices = Annotated[
    int | Literal["auto"],
    PlainValidator(_devices),  # a union would name both halves in its errors
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"const": "auto"}]}),
]


class Section(BaseModel):
    """Base of every group of settings: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SyntheticSettings(Section):
    """Shape of the embedded catalogue (`core.synthetic`)."""

    users: Positive = 2000
    items: Positive = 2400
    mean_length: Annotated[float, Field(ge=4)] = 13.0


class DataSettings(Section):
    """Where the ratings come from and how they are cut."""

    source: Source = "synthetic"
    root: str = "data"
    """Folder (MovieLens layouts) or file (`csv`, `parquet`) that holds the ratings; a folder of
    files too for `parquet`.
    """
    items_file: str | None = None
    """`csv`/`parquet` only: table of item_id, title. Without it titles are the item ids."""
    limit_data_rows: Limit = -1
    """Interactions kept, -1 = all: whole users are drawn with `data.seed` until this many rows are
    reached.
    """
    limit_eval_users: Limit = -1
    """Users ranked in validation and test, -1 = all; drawn with `data.seed`."""
    min_interactions: Annotated[int, Field(ge=3)] = 3
    """Users with fewer interactions are dropped: leave-one-out needs three."""
    seed: int = 0
    batching: Batching = "grouped"
    """Which prompts of the teacher meet in a batch: `padded` at random, `grouped` those of similar
    length, one a row; `packed` at random, several a row, every batch of one shape.
    """
    synthetic: SyntheticSettings = SyntheticSettings()


class StudentSettings(Section):
    """The SASRec model (baseline student, distilled student, frozen encoder of the teacher) and its
    training.
    """

    hidden_size: Positive = 64
    num_blocks: Positive = 2
    num_heads: Positive = 1
    dropout: Fraction = 0.1
    max_length: Positive = 50
    loss: Literal["softmax", "bce", "gbce"] = "softmax"
    num_negatives: Positive = 256
    """Sampled negatives per position, `bce` and `gbce` only."""
    gbce_t: Annotated[float, Field(ge=0.0, le=1.0)] = 0.75
    """Calibration of gBCE: 0 = plain BCE, 1 = fully calibrated (gSASRec)."""
    precision: Literal["fp32", "bf16-mixed"] = "fp32"
    batch_size: Positive = 128
    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: NonNegative = 0.0
    max_epochs: Positive = 60
    patience: Positive = 5
    """Validations without a better ndcg@10 before training stops."""
    eval_every: Positive = 1
    """Epochs between validations."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "StudentSettings":
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            )
        return self


class TeacherSettings(Section):
    """The iLoRA teacher: backbone, adapter, gate, prompt and item head."""

    llm_model_name: str = "tiny"
    """Hub id, local folder, or an architecture preset with random weights (`core.llm.PRESETS`)."""
    mode: Mode = "instance"
    """`instance`: a prompt and a gate for each sample (iLoRA). `causal` and `tail` answer all
    samples of a user's window in one prompt, many times cheaper, and are other models: in `causal`
    each item's tokens have the gate of the history up to it; in `tail` the history has none and
    each sample its copy of the prompt's end.
    """
    adapter: Literal["lora", "qlora"] = "lora"
    attn: Literal["eager", "sdpa", "flash_attention_2"] = "sdpa"
    gradient_checkpointing: bool | None = False
    """null leaves it to peft: `prepare_model_for_kbit_training` switches it on for 4-bit backbones
    (and holds norms and embeddings in fp32), nothing does for others.
    """
    use_cache: bool = False
    """Keep keys and values of each forward. Scoring is one forward for each row: never read."""
    bnb_4bit_use_double_quant: bool = False
    """`qlora` only: quantise the constants of the 4-bit blocks too."""
    lora_r: Positive = 8
    lora_alpha: Annotated[float, Field(gt=0)] = 32.0
    lora_dropout: Fraction = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    num_experts: Positive = 4
    """Experts K of the gate; each owns lora_r / K rank slices."""
    gate: Literal["mlp", "linear", "resnet"] = "mlp"
    use_item_embeddings_head: bool = True
    """True: scores are h·P(e_i) with a trainable table started from the student's; False: random
    linear head.
    """
    train_candidates: Positive = 2048
    """Items in the training softmax (batch targets + uniform negatives); the whole catalogue if it
    is no larger.
    """
    max_history: Positive = 10
    """Items shown in a prompt, newest last; the oldest are dropped."""
    max_title_tokens: Positive = 16
    item_token_dropout: Fraction = 0.0
    """Probability that training blanks an item token. The SASRec rows behind these tokens were
    trained on the same samples, so they tell more in training than they do later: without it a
    small teacher learns to read them and not the titles."""
    inference_batch_size: Positive = 64
    distill_loss_type: Literal["mse", "cosine", "l1", "huber", "contrastive"] = "mse"
    distill_decay_type: Literal["none", "linear", "cosine", "exponential"] = "linear"
    distill_lambda: NonNegative = 0.1
    """Weight of reverse distillation at the start. The users' guide names no default; 0.1 is their
    configuration's.
    """
    distill_min_lambda: NonNegative = 0.0
    distill_decay_steps: Positive | None = None
    """Optimizer steps until `distill_min_lambda` is reached, then held; null = all training steps.
    """
    outputs_top_k: Positive = 10
    rec_model_checkpoint_path: str | None = None
    """SASRec checkpoint for gate and item tokens; null = the one `student_fit` made."""

    @model_validator(mode="after")
    def _ranks_divide(self) -> "TeacherSettings":
        if self.lora_r % self.num_experts:
            raise ValueError(
                f"lora_r {self.lora_r} is not a multiple of num_experts {self.num_experts}: "
                "each expert owns lora_r / num_experts rank slices"
            )
        if self.bnb_4bit_use_double_quant and self.adapter != "qlora":
            raise ValueError(
                "bnb_4bit_use_double_quant acts on 4-bit layers only: set teacher.adapter to qlora"
            )
        if self.use_cache and self.gradient_checkpointing is not False:
            raise ValueError(
                "use_cache: transformers drops the cache while gradient_checkpointing trains; "
                "set one of the two to false"
            )
        if self.distill_min_lambda > self.distill_lambda:
            raise ValueError(
                f"distill_min_lambda {self.distill_min_lambda} is larger than "
                f"distill_lambda {self.distill_lambda}"
            )
        return self


class TrainSettings(Section):
    """How the teacher is trained; `trainer` and `num_workers` serve every fit."""

    trainer: Literal["loop", "lightning"] = "loop"
    devices: Devices = 1
    """Processes that train the teacher together, each on a device of its own (GPU, or share of the
    CPU's cores); auto = all GPUs. They divide every micro-batch, so the training stays the same.
    Lightning only; other fits and everything that scores use one.
    """
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """How several devices share the work; auto = ddp."""
    precision: Precision = "fp32"
    compile: Literal["off", "regional", "whole"] = "off"
    """torch.compile of the teacher's backbone: each layer apart (`regional`) or all of it."""
    batch_size: Positive = 32
    accumulate_grad_batches: Positive = 1
    num_workers: Annotated[int, Field(ge=0)] = 0
    max_epochs: Positive = 4
    max_steps: Limit = -1
    """Micro-batches per epoch at most, -1 = all."""
    lr: Annotated[float, Field(gt=0)] = 8e-4
    weight_decay: NonNegative = 0.01
    gradient_clip_val: NonNegative = 1.0
    """Largest gradient norm; 0 = no clipping."""
    patience: Positive = 5

    @model_validator(mode="after")
    def _devices_fit(self) -> "TrainSettings":
        if self.devices == 1:
            if self.strategy != "auto":
                raise ValueError(f"strategy {self.strategy} needs train.devices above 1")
            return self
        if self.trainer == "loop":
            raise ValueError(
                f"devices {self.devices}: the plain loop drives one; set train.trainer to lightning"
            )
        if self.devices != "auto" and self.devices > self.batch_size:
            raise ValueError(
                f"devices {self.devices} is more than batch_size {self.batch_size}: the rows of a "
                "micro-batch are divided among them"
            )
        if self.precision == "fp16-true":
            raise ValueError(
                "precision fp16-true trains fp32 copies, which get their gradients before those "
                "of several devices are averaged; use fp16-mixed, or one device"
            )
        return self


class DistillSettings(Section):
    """DLLM2Rec: how the student learns from the teacher's stored outputs."""

    mode: Literal["paper", "reference"] = "paper"
    lam: NonNegative = 0.8
    """Weight of the ranking distillation (lambda_d of the paper)."""
    candidate_topk: Positive = 10
    beta_position: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of the position weight exp(-rank / beta)."""
    gamma_position: NonNegative = 0.3
    gamma_confidence: NonNegative = 0.5
    gamma_consistency: NonNegative = 0.1
    ed_weight: NonNegative = 0.2
    """Weight of the projected LLM item embedding in the student's input; 0 = no embedding
    distillation.
    """
    alpha: NonNegative = 0.0
    """Weight of the distributionally robust (DRO) term; 0 = off."""
    dro_beta: Annotated[float, Field(gt=0)] = 1.0
    """Robust radius of the DRO term."""
    propensity_power: NonNegative = 0.05
    bug_compat: bool = False
    """`reference` only: keep log σ(1−s) and the (B,B) weights of the released code."""
    batch_size: Positive = 128
    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: NonNegative = 0.0
    max_epochs: Positive = 60
    patience: Positive = 5
    teacher_checkpoint_path: str | None = None
    """Folder of a `teacher_outputs` artefact; null = the one of this run."""


class EvalSettings(Section):
    """Full-ranking evaluation shared by student, teacher and distilled student."""

    top_k: tuple[Positive, ...] = (5, 10, 20)
    mask_seen: bool = True
    """Remove items of the user's history from the ranking (never the target)."""
    batch_size: Positive = 256


class MachineSettings(Section):
    """Where it runs."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads of torch, 0 = one for each core."""
    image: Annotated[str, AfterValidator(_image)] = "host"
    """`host`: this interpreter; `cu118`, `cu121`: the image built from Dockerfile.<image>; else a
    reference of an image that a container engine here has.
    """
    allocator_conf: str | None = None
    """Options of torch's CUDA allocator (`PYTORCH_CUDA_ALLOC_CONF`); null leaves the environment's.
    """
    env: tuple[Annotated[str, AfterValidator(_variable)], ...] = ()
    """Environment variables, `NAME=value` each, of the interpreter that runs."""

    @model_validator(mode="after")
    def _variables_once(self) -> "MachineSettings":
        names = [entry.partition("=")[0] for entry in self.env]
        if self.allocator_conf is not None:
            names.append("PYTORCH_CUDA_ALLOC_CONF")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"env: {name} is given twice (allocator_conf sets one too)")
        return self


class Settings(Section):
    """One complete configuration of the pipeline."""

    seed: int = 0
    data: DataSettings = DataSettings()
    student: StudentSettings = StudentSettings()
    teacher: TeacherSettings = TeacherSettings()
    train: TrainSettings = TrainSettings()
    distill: DistillSettings = DistillSettings()
    eval: EvalSettings = EvalSettings()
    machine: MachineSettings = MachineSettings()

    @model_validator(mode="after")
    def _sections_agree(self) -> "Settings":
        masked = [
            name
            for name, on in (
                ("data.batching: packed", self.data.batching == "packed"),
                ("teacher.mode: tail", self.teacher.mode == "tail"),
            )
            if on
        ]
        if masked and self.teacher.attn == "flash_attention_2":
            raise ValueError(
                f"{masked[0]} needs an explicit mask, which teacher.attn: flash_attention_2 does "
                "not take; use sdpa"
            )
        if masked and self.teacher.use_cache:
            raise ValueError(
                f"{masked[0]} lets tokens of a row not see each other; no cache of keys and values "
                "serves such rows: set teacher.use_cache to false"
            )
        if self.data.batching == "packed" and self.train.devices != 1:
            raise ValueError(
                "data.batching: packed packs the rows of one process; with train.devices above 1 "
                "use grouped"
            )
        if self.train.precision == "fp8" and self.teacher.adapter == "qlora":
            raise ValueError(
                "train.precision: fp8 casts the frozen linear layers, which teacher.adapter: qlora "
                "holds in 4 bit; use lora, or bf16-mixed"
            )
        if self.train.compile == "regional" and self.teacher.use_cache:
            raise ValueError(
                "train.compile: regional compiles one layer for all, and with teacher.use_cache "
                "each writes keys and values under its own number; use whole, or no cache"
            )
        return self
