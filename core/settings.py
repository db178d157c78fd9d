"""Every knob of the pipeline, typed and frozen; no I/O, importable without torch.

Validators only reject combinations, with the reason; no value is derived here, so what a file says
is what runs. Leaf names follow transformers, peft, Lightning and the users' own notes.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Precision = Literal["fp32", "bf16-mixed", "bf16-true", "fp16-mixed"]
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
    """Folder (MovieLens layouts) or file (`csv`, `parquet`) that holds the ratings."""
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
    adapter: Literal["lora", "qlora"] = "lora"
    attn: Literal["eager", "sdpa", "flash_attention_2"] = "sdpa"
    gradient_checkpointing: bool = False
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
        if self.distill_min_lambda > self.distill_lambda:
            raise ValueError(
                f"distill_min_lambda {self.distill_min_lambda} is larger than "
                f"distill_lambda {self.distill_lambda}"
            )
        return self


class TrainSettings(Section):
    """How the teacher is trained; `trainer` and `num_workers` serve every fit."""

    trainer: Literal["loop", "lightning"] = "loop"
    precision: Precision = "fp32"
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
    image: Literal["host", "cu118", "cu121"] = "host"
    """`host`: this interpreter; otherwise the container image built from Dockerfile.<image>."""


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
