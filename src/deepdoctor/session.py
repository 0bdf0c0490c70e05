"""What the stages of one run share: tokenizer, prompt, base weights and adapter, each loaded once, when needed."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from deepdoctor.compare.tasks.load import load_task
from deepdoctor.data.prompt import THINK_CLOSE, THINK_OPEN, Prompt
from deepdoctor.data.rows import Question
from deepdoctor.errors import DataError, RunError, UsageError
from deepdoctor.model.adapter import Adapter, LoraSettings
from deepdoctor.model.block_pool import check_format
from deepdoctor.model.config import ModelConfig
from deepdoctor.model.decoder import Decoder
from deepdoctor.model.generate import Words
from deepdoctor.model.load import choose_device, free_memory, limit_memory, load_decoder, load_tokenizer, resolve_model
from deepdoctor.model.quantize import is_bnb_config
from deepdoctor.model.sampling import Sampling
from deepdoctor.model.tokenizer import Tokenizer
from deepdoctor.recipe import CompareSection, Recipe, SamplingSection
from deepdoctor.run_folder import RunFolder
from deepdoctor.sizes import parse_size
from deepdoctor.ui import Reporter

__all__ = ["Session"]

ROOM_BYTES = 2 * 2**30
"""What answering wants beside the base: keys and values of a few answers, and a prompt."""


@contextmanager
def _quick_turns() -> Iterator[None]:
    """Let threads take turns ten times as often: readers and consumer of weights wait for one another."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(before / 10)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class Session:
    """One recipe on this machine, with an optional run folder."""

    def __init__(self, recipe: Recipe, run: RunFolder | None, reporter: Reporter):
        self.recipe = recipe
        self.run = run
        self.reporter = reporter
        self._adapter: Adapter | None = None

    @cached_property
    def source(self) -> Path:
        """Local folder (or .gguf file) of the base model."""
        return resolve_model(self.recipe.model.id, self.recipe.model.revision)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The base model's tokenizer."""
        return load_tokenizer(self.source)

    @cached_property
    def prompt(self) -> Prompt:
        """The one prompt object of the run."""
        data = self.recipe.data
        return Prompt(self.tokenizer, data.template, data.system, data.train_on)

    @cached_property
    def words(self) -> Words:
        """What a thinking limit needs: the text after which thinking is over, and the tokens that close it.

        They are what a training row has there: a line break, the tag, and the template's gap before the answer.
        """
        closing = self.tokenizer.encode(f"\n{THINK_CLOSE}{self.prompt.gap}")
        return Words(self.tokenizer.decode, THINK_CLOSE, tuple(closing), self.prompt.opens_think, THINK_OPEN)

    @cached_property
    def tasks(self) -> list[list[Question]]:
        """The questions of every task of the recipe.

        Raises DataError for questions that cannot be used, HubError for a set that cannot be had, UsageError for
        settings they cannot be asked with.
        """
        self.sampling(self.recipe.compare, self.recipe.seed)
        return [questions for questions, _ in self._tasks]

    @property
    def task_sources(self) -> dict[str, dict[str, Any]]:
        """Where the questions of every task are from, by the task's name (``load_task``)."""
        return {questions[0].task: where for questions, where in self._tasks}

    @cached_property
    def _tasks(self) -> list[tuple[list[Question], dict[str, Any]]]:
        """Questions and their sources; the manifest keeps the sources, and a run keeps to the commits it has used."""
        section = self.recipe.compare
        kept = dict(self.run.manifest.get("task_sources", {})) if self.run is not None else {}
        pinned = {name: where.get("revision") for name, where in kept.items()}
        tasks = [load_task(source, section.max_questions, self.recipe.seed, pinned) for source in section.tasks]
        names = [questions[0].task for questions, _ in tasks]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise DataError(
                f"compare.tasks has two question sets called {twice}",
                "name a known set once; a file's set is named after the file: rename one",
            )
        found = {**kept, **{name: where for name, (_, where) in zip(names, tasks, strict=True)}}
        if self.run is not None and found != kept:
            self.run.update(task_sources=found)
        return tasks

    @cached_property
    def decoder(self) -> Decoder:
        """The frozen base, loaded now."""
        model = self.recipe.model
        device = choose_device(model.device)
        # Compare answers after training: what it cannot have had better be known before.
        for name, section in (("ask", self.recipe.ask), ("compare", self.recipe.compare)):
            check_format(section.kv_cache, device, f"{name}.kv_cache")
        if model.vram and device.type == "cuda":
            limit_memory(device, parse_size(model.vram, "model.vram"))
        started = time.perf_counter()
        config_layers = None
        if self.source.is_dir():
            config_layers = ModelConfig.from_folder(self.source).num_layers
        with self.reporter.meter("load", config_layers or 1, "layers") as meter, _quick_turns():
            decoder = load_decoder(
                self.source,
                model.precision,
                device,
                double_quant=model.double_quant,
                embedding_on_host=self._short_of_memory(device),
                on_layer=lambda done, total: meter.advance(1 if config_layers else 1 / total),
            )
        seconds = time.perf_counter() - started
        dtype = str(decoder.compute_dtype).removeprefix("torch.")
        self.reporter.say(
            f"base {self.recipe.model.id}: {decoder.config.parameters / 1e6:,.1f} M weights as {decoder.precision}, "
            f"computed in {dtype} on {decoder.device} ({decoder.nbytes / 2**20:,.0f} MiB, {seconds:.1f} s)"
        )
        return decoder

    def _short_of_memory(self, device: torch.device) -> bool:
        """Whether the embedding had better wait in host memory: the base leaves less than ROOM_BYTES of the GPU."""
        if device.type != "cuda" or not self.source.is_dir():
            return False
        config = ModelConfig.from_folder(self.source)
        quantised = self.recipe.model.precision == "nf4" or is_bnb_config(dict(config.raw))
        weights = config.linear_parameters * (0.53 if quantised else 2) + 4 * config.vocab_size * config.hidden_size
        return free_memory(device) < weights + ROOM_BYTES

    @property
    def reduced(self) -> bool:
        """Whether a CPU may decode from bf16 or 4-bit copies: only where the recipe leaves the format to us."""
        return self.recipe.model.precision == "auto"

    def new_adapter(self) -> Adapter:
        """Return a fresh adapter that starts as the base."""
        train = self.recipe.train
        settings = LoraSettings(
            train.lora_rank, train.lora_alpha, train.lora_dropout, train.rslora, tuple(train.target_modules)
        )
        return Adapter(self.decoder.config, settings, self.recipe.seed)

    @property
    def adapter(self) -> Adapter:
        """The trained adapter of the run, on the decoder's device. Raises RunError where there is none yet."""
        if self._adapter is None:
            assert self.run is not None
            folder = self.run.path / "train" / "adapter"
            if not folder.is_dir():
                raise RunError(f"{self.run.path} has no trained adapter yet", "run `deepdoctor train RECIPE` first")
            self._adapter = Adapter.load(folder, self.decoder.config).to(self.decoder.device).eval()
        return self._adapter

    @adapter.setter
    def adapter(self, adapter: Adapter) -> None:
        self._adapter = adapter

    def sampling(self, section: SamplingSection, seed: int) -> Sampling:
        """Resolve a sampling section: what is null comes from the model's authors, else greedy.

        Raises UsageError for several samples of one question where that is greedy: they would all be the same.
        """
        temperature, top_p = section.temperature, section.top_p
        if temperature is None:
            temperature = self.tokenizer.temperature or 0.0
        if top_p is None:
            top_p = self.tokenizer.top_p or 1.0
        if isinstance(section, CompareSection) and section.samples > 1 and not temperature:
            raise UsageError(
                f"compare.samples is {section.samples}, but answers are greedy: the model names no temperature",
                "set `compare.temperature` above 0, e.g. 0.6, or `compare.samples` to 1",
            )
        return Sampling(
            max_new_tokens=section.max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            repetition_penalty=section.repetition_penalty,
            seed=seed,
            top_k=section.top_k,
            min_p=section.min_p,
            max_thinking_tokens=section.max_thinking_tokens,
        )
