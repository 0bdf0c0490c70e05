"""Every setting of a run, typed: one frozen section per stage, unknown keys refused.

The same class serves the YAML file, the command line and the Python API; ``recipe_file`` reads and merges them.
"""

from __future__ import annotations

from typing import Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from deepdoctor.sizes import Size

__all__ = [
    "AskSection",
    "CompareSection",
    "DataSection",
    "ExportSection",
    "ModelSection",
    "PushSection",
    "Recipe",
    "SamplingSection",
    "Section",
    "TrackSection",
    "TrainSection",
]

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROJECTIONS: tuple[Projection, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Doubt = Literal[
    "picture_in_reasoning", "duplicate_question", "near_duplicate", "uniform_opening", "chat_markers", "injection",
    "markup", "personal_data", "language_mix", "answer_in_question", "unsupported_answer",
]  # fmt: skip
Placebo = Literal["native_prompt", "shuffled_answers", "shuffled_rows"]
PLACEBOS: tuple[Placebo, ...] = ("native_prompt", "shuffled_answers", "shuffled_rows")


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, docstrings become the schema's descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class ModelSection(Section):
    """Which base model, and in which precision it is held."""

    id: str
    """``embedded:smollm2-135m-instruct``, a Hub id, a local folder, or a ``.gguf`` file."""
    revision: str | None = None
    """Hub commit, tag or branch; pin a commit for a run that others can repeat."""
    precision: Literal["auto", "nf4", "fp8", "bf16", "fp16", "fp32"] = "auto"
    """How the frozen base is held (fp8: in bf16, trained by fp8 products). auto: as stored where it is 4-bit; else bf16
    on a GPU that has it (fp16 where not), and on a CPU whichever of bf16 and fp32 multiplies faster there."""
    double_quant: bool = True
    """NF4 only: quantise the block scales too, as bitsandbytes does. Source: QLoRA (arXiv 2305.14314)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one. ``cuda`` on a machine without one is an error."""
    vram: Size | None = None
    """Use no more of the GPU than a card of this size has, e.g. ``15GiB`` (null: the whole card)."""


class DataSection(Section):
    """Which rows, in which words, and what is done with the doubtful ones."""

    source: str
    """``embedded:rows``, a Hub data set id, or a .jsonl, .json, .csv or .parquet file."""
    config: str | None = None
    """Hub configuration name, e.g. ``en``."""
    revision: str | None = None
    """Hub commit, tag or branch of the data set."""
    split: str = "train"
    """Hub split."""
    question: str = "Question"
    """Column that holds the question."""
    reasoning: str = "Complex_CoT"
    """Column that holds the chain of thought."""
    answer: str = "Response"
    """Column that holds the final answer."""
    max_rows: PositiveInt | None = None
    """Take only the first N rows of the source (null: all)."""
    held_out: NonNegativeInt | NonNegativeFloat = Field(default=0.05, union_mode="left_to_right")
    """Rows kept out of training: a count (16) or a share (0.05). A hash of the question decides, so a share never
    moves a row across."""
    template: str = "native"
    """``native`` (the model's own chat format), ``tutorial`` (instruction format), or the path of a Jinja file."""
    system: str | None = None
    """System message; null leaves the template's own default."""
    max_seq_len: PositiveInt = 2048
    """Tokens a row may have; longer rows are handled by ``too_long``."""
    too_long: Literal["drop", "error"] = "drop"
    """Rows over max_seq_len are dropped and named, or stop the run; they are never cut."""
    duplicates: Literal["drop", "keep"] = "drop"
    """Second and later copies of the same row."""
    missing_image: Literal["drop", "keep"] = "drop"
    """Rows whose question needs a picture that is not there."""
    drop: tuple[Doubt, ...] = ()
    """Findings whose rows go too, e.g. ``[near_duplicate, markup]``; all others of these are kept and named."""
    overlap: Literal["drop", "keep"] = "keep"
    """Training rows that look like a question of ``compare.tasks``; they are counted in any case."""
    overlap_embedding: bool = False
    """Look for them by the base model's token embeddings too; see docs/guide/data.md for how little that adds."""
    train_on: Literal["reasoning_and_answer", "answer", "all"] = "reasoning_and_answer"
    """Which tokens carry loss; ``all`` adds the prompt."""

    @field_validator("held_out", mode="after")
    @classmethod
    def _share_below_one(cls, value: int | float) -> int | float:
        if isinstance(value, float) and value >= 1:
            if value != int(value):
                raise ValueError("a share must be below 1; write a whole number to hold out that many rows")
            return int(value)
        return value


class TrainSection(Section):
    """The LoRA adapter and the optimizer."""

    lora_rank: PositiveInt = 16
    """R, the adapter's inner width. Source: LoRA (arXiv 2106.09685), 8 to 64 usual."""
    lora_alpha: PositiveFloat = 16
    """The adapter's product is scaled by alpha / R (alpha / sqrt(R) with rslora)."""
    lora_dropout: NonNegativeFloat = Field(default=0.0, lt=1)
    """Dropout on the adapter's input."""
    rslora: bool = False
    """Scale by alpha / sqrt(R). Source: rsLoRA (arXiv 2312.03732)."""
    target_modules: tuple[Projection, ...] = PROJECTIONS
    """Projections that get an adapter."""
    global_batch_size: PositiveInt = 8
    """Rows per optimizer step, over all micro-batches and ranks."""
    micro_batch_size: PositiveInt | None = None
    """Most rows in one micro-batch (null: only the token budget counts). The result does not depend on it."""
    micro_batch_tokens: PositiveInt | None = None
    """Token budget of a micro-batch (null: chosen by the plan). The result does not depend on it."""
    max_steps: PositiveInt | None = None
    """Optimizer steps; null trains for ``epochs``."""
    epochs: PositiveFloat = 1.0
    """Passes over the rows, where max_steps is null."""
    learning_rate: PositiveFloat = 2e-4
    """Peak AdamW step size. Source: QLoRA (arXiv 2305.14314), 7B to 13B."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Learning rate after the warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from zero."""
    warmup_ratio: NonNegativeFloat = Field(default=0.0, lt=1)
    """Share of the steps that warm up, where warmup_steps is 0."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """AdamW with state in fp32, or in 8 bits: a quarter of the memory, on a CPU slower."""
    attention: Literal["auto", "fa4", "flash", "efficient", "rows"] = "auto"
    """Attention on a GPU. auto: the fastest that is worth its start-up. fa4 needs the package flash-attn-4."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of the adapter."""
    beta1: NonNegativeFloat = Field(default=0.9, lt=1)
    """AdamW's first moment decay."""
    beta2: NonNegativeFloat = Field(default=0.999, lt=1)
    """AdamW's second moment decay."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Clip the gradient's global norm to this; 0 switches clipping off."""
    shuffle: bool = True
    """Draw a new row order each epoch from the seed; false keeps the source's order."""
    eval_steps: NonNegativeInt = 0
    """Held-out loss every N steps; 0: only before and after."""
    save_steps: NonNegativeInt = 50
    """Checkpoint every N steps; 0: only at the end and on Ctrl-C."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints kept on disk."""

    @field_validator("target_modules")
    @classmethod
    def _some_target(cls, value: tuple[Projection, ...]) -> tuple[Projection, ...]:
        if not value:
            raise ValueError("name at least one projection")
        return tuple(p for p in PROJECTIONS if p in value)

    @model_validator(mode="after")
    def _one_warmup(self) -> TrainSection:
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("set warmup_steps or warmup_ratio, not both")
        return self


class SamplingSection(Section):
    """How answers are drawn; base and tuned always share it."""

    max_new_tokens: PositiveInt = 1024
    """Tokens an answer may have, thinking included."""
    temperature: NonNegativeFloat | None = None
    """0 is greedy. null: what the model's authors recommend (R1 family: 0.6), else greedy."""
    top_p: PositiveFloat | None = Field(default=None, le=1)
    """Nucleus sampling. null: what the model's authors recommend (R1 family: 0.95), else 1."""
    top_k: NonNegativeInt = 0
    """Draw from the K most likely tokens only; 0 is off."""
    min_p: NonNegativeFloat = Field(default=0.0, lt=1)
    """Leave out tokens below this share of the likeliest one's probability (arXiv 2407.01082); 0 is off."""
    repetition_penalty: PositiveFloat = 1.0
    """Divides the logits of tokens already in prompt or answer (CTRL, arXiv 1909.05858); 1 is off."""
    max_thinking_tokens: PositiveInt | None = None
    """The thinking is closed for the model once this budget is spent (arXiv 2501.19393); null: never."""
    batch_size: PositiveInt = 16
    """Answers written at once."""
    kv_cache: Literal["auto", "fp8", "int8"] = "auto"
    """What our engine holds keys and values in. auto: as computed. fp8, int8: half the memory, so more answers at once
    on a GPU, and less exact; see docs/concepts/exactness.md for how much."""


class AskSection(SamplingSection):
    """Questions put to base and tuned, before and after, for people to read."""

    questions: tuple[str, ...] = ()
    """Asked of the base before training and of both sides after it."""
    max_new_tokens: PositiveInt = 1200
    """Tokens an answer may have, thinking included."""


class CompareSection(SamplingSection):
    """The measurement: both sides answer the same unseen questions."""

    held_out_loss: bool = True
    """Loss and perplexity on the held-out rows, reasoning and answer apart."""
    held_out_questions: NonNegativeInt = 16
    """Held-out rows whose question both sides answer, judged by form and length."""
    tasks: tuple[str, ...] = ()
    """Questions with a key: a known set (``medqa``, ``medqa@COMMIT``), ``embedded:questions``, or JSONL files with id,
    question, options, answer."""
    max_questions: PositiveInt | None = None
    """Questions per task, drawn by seeded hash, never the first N (null: all)."""
    samples: PositiveInt = 1
    """Answers per question and side; the majority letter counts. Above 1 needs a temperature above 0."""
    shuffle_options: bool = False
    """Show each question's options in an order drawn by seed (another for each sample), the same to both sides."""
    harm_margin: PositiveFloat | None = Field(default=None, lt=1)
    """A loss (share of right answers) that a harm check such as PubMedQA is to rule out. null: the set's own margin."""
    engine: Literal["deepdoctor", "vllm"] = "deepdoctor"
    """Who writes the answers: our own engine, or a vLLM server with the same prompts; losses are ours in any case."""
    vllm_url: str | None = None
    """engine vllm: a server that runs and has the adapter under the name ``tuned``, e.g. ``http://127.0.0.1:8000``."""
    vllm_python: str | None = None
    """engine vllm: the Python of vLLM's own environment, to start a server with."""
    placebo: tuple[Placebo, ...] = ()
    """Further sides that share form, not teaching. native_prompt: the base asked in its own chat format.
    shuffled_answers, shuffled_rows: adapters trained on the same rows with the answers (and reasoning) of other
    questions; each trains once more."""

    @field_validator("placebo")
    @classmethod
    def _each_once(cls, value: tuple[Placebo, ...]) -> tuple[Placebo, ...]:
        return tuple(arm for arm in PLACEBOS if arm in value)

    @model_validator(mode="after")
    def _some_variety_and_room(self) -> CompareSection:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("samples above 1 need a temperature above 0: greedy answers are all the same")
        if self.max_thinking_tokens is not None and self.max_thinking_tokens >= self.max_new_tokens:
            raise ValueError("max_thinking_tokens must be below max_new_tokens, which the answer is part of")
        if self.engine == "vllm" and (self.vllm_url is None) == (self.vllm_python is None):
            raise ValueError("engine vllm needs either vllm_url or vllm_python")
        if self.engine == "vllm" and self.kv_cache != "auto":
            raise ValueError("kv_cache is our own engine's: start the vLLM server with --kv-cache-dtype instead")
        return self


class ExportSection(Section):
    """What is written for use elsewhere."""

    adapter: bool = True
    """``export/adapter``: PEFT files."""
    merged: bool = True
    """``export/merged``: safetensors in the base's 16-bit (or 32-bit) weights, checked against base + adapter."""
    merge_into: Literal["auto", "original", "dequantised"] = "auto"
    """Trained over NF4: merge into the published weights, or into what NF4 made of them; auto: the closer to training
    on held-out rows."""
    merged_4bit: bool = False
    """``export/merged_4bit``: the merged model as NF4 safetensors that transformers loads with bitsandbytes."""
    gguf: tuple[Literal["f16", "q8_0", "q4_1", "q4_0"], ...] = ()
    """``export/gguf``: files for llama.cpp and Ollama in these types, e.g. ``[q8_0]``; needs the package gguf."""


class PushSection(Section):
    """Publishing on the Hugging Face Hub at the end of a run; the token is checked before the run starts."""

    to: str | None = None
    """``user/name``, or ``name`` in the token's own account; the adapter goes to ``user/name-lora`` (null: nowhere)."""
    what: tuple[Literal["adapter", "merged", "merged_4bit", "gguf", "all"], ...] = ("all",)
    """Which exports go there; all: every one the run makes."""
    public: bool = False
    """Let everybody see it; false makes private repositories."""
    base: str | None = None
    """Hub id of the base, where ``model.id`` is a local folder: what the adapter then loads on."""

    @field_validator("what", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("what")
    @classmethod
    def _something(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("name at least one of adapter, merged, merged_4bit, gguf, or all")
        return value


class TrackSection(Section):
    """Where else a run is shown while it goes on; ``train/metrics.jsonl`` is written in any case."""

    to: tuple[Literal["trackio", "wandb", "tensorboard"], ...] = ()
    """trackio: on this computer, shown by ``deepdoctor dashboard``. wandb: Weights & Biases, offline where there is no
    key or no server. Both get the recipe, the answers to ``ask.questions`` and the report."""
    project: str = Field(default="deepdoctor", min_length=1, max_length=128, pattern=r"^[^/\\#?%:]+$")
    """Project that the run belongs to; its name there is the recipe's."""
    entity: str | None = None
    """wandb: account or team (null: the account's own default)."""
    group: str | None = None
    """Runs of one group are shown together."""
    job_type: str | None = None
    """A word for the kind of run, e.g. ``training``."""

    @field_validator("to", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("to")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(value))


class Recipe(Section):
    """One run, from rows to a served model."""

    name: str = "run"
    """Folder under ``runs_dir``."""
    runs_dir: str = "runs"
    """Where run folders live."""
    seed: NonNegativeInt = 3407
    """Row order, adapter start, dropout and sampling all follow from it."""
    model: ModelSection
    """Base model."""
    data: DataSection
    """Training rows."""
    train: TrainSection = TrainSection()
    """Adapter and optimizer."""
    ask: AskSection = AskSection()
    """Questions for people to read."""
    compare: CompareSection = CompareSection()
    """The measurement."""
    export: ExportSection = ExportSection()
    """Files for use elsewhere."""
    push: PushSection = PushSection()
    """Publishing."""
    track: TrackSection = TrackSection()
    """Trackers."""

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not value or value in {".", ".."} or any(c in value for c in "/\\\0"):
            raise ValueError("a run name is one folder name without slashes")
        return value

    @model_validator(mode="after")
    def _push_what_is_exported(self) -> Recipe:
        if self.push.to is not None:
            missing = [kind for kind in self.push.what if kind != "all" and not getattr(self.export, kind, False)]
            if missing:
                raise ValueError(f"push.what names {missing[0]}, which export does not write")
            if not any(getattr(self.export, kind, False) for kind in ("adapter", "merged", "merged_4bit", "gguf")):
                raise ValueError(f"push.to is {self.push.to}, but export writes nothing")
        return self

    def to_yaml(self) -> str:
        """Return the resolved recipe, every field written out, as YAML text."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
