"""``export/gguf``: GGUF files, a Modelfile, a card, and how much of the training each file keeps.

Every file is read back and set beside base + adapter on held-out rows, and where the wheel ``xllamacpp`` is there,
llama.cpp loads it and answers held-out questions. llama.cpp's tokens are judged one by one: given the prompt and what
it wrote before, would base + adapter have written the same?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from deepdoctor.data.prompt import EncodedRow
from deepdoctor.data.store import PreparedData
from deepdoctor.errors import ParityError
from deepdoctor.export.card import write_card
from deepdoctor.export.gguf_write import write_gguf
from deepdoctor.export.llamacpp import INSTALL, LlamaAnswer, has_llamacpp, llamacpp_answers
from deepdoctor.export.measure import GGUFWeights, closeness, logits_of, openings, streamed_logits
from deepdoctor.export.merge import MergedWeights
from deepdoctor.export.modelfile import modelfile
from deepdoctor.kernels.linear_cross_entropy import IGNORE_INDEX
from deepdoctor.model.adapter import Adapter
from deepdoctor.model.decoder import Decoder
from deepdoctor.model.generate import Generator, Request
from deepdoctor.model.sampling import Sampling
from deepdoctor.model.sides import TUNED
from deepdoctor.run_folder import write_json
from deepdoctor.session import Session

__all__ = ["as_row", "gguf_files", "logprobs_apart", "write_ggufs"]

ANSWERS = 4
ANSWER_TOKENS = 48
"""Held-out questions that llama.cpp answers, and tokens of each answer."""
FAITHFUL, APART = 0.75, 0.5
"""llama.cpp reads a file otherwise than we do where fewer of its tokens are what our decoder gives for the file, and
their log probabilities are further off than this (nats)."""
_CONTEXT = 8192
_FINE = ("f16", "q8_0")
"""Kinds too fine to lose an adapter; a coarser one that does is kept, with a figure that says so."""
_PREFERRED = ("q8_0", "f16", "q4_1", "q4_0")


@dataclass(frozen=True)
class LlamaParity:
    """llama.cpp's greedy answers from one file.

    greedy_agreement: share of its tokens that base + adapter would have written there; same_file: that our decoder
    would have written from the same file; logprob_difference: mean distance to our decoder's log probability of them,
    same file, nats. same_answers: answers equal to those of base + adapter from start to end.
    """

    version: str
    questions: int
    tokens: int
    greedy_agreement: float
    same_file: float
    logprob_difference: float
    same_answers: int


def gguf_files(name: str, kinds: Sequence[str]) -> dict[str, str]:
    """File name of every kind."""
    return {kind: f"{name}-{kind}.gguf" for kind in kinds}


def write_ggufs(session: Session, data: PreparedData, folder: Path, held: Decoder | None) -> dict[str, Any]:
    """Fill ``folder``: one .gguf of each kind in the recipe, Modelfile, parity.json, README.md; return the parity.

    Answers next to each other go to ``export/gguf_answers.json``.

    held: the NF4 base that the adapter is merged into, None for the published weights.
    Raises ParityError for a file that llama.cpp cannot load, cuts prompts otherwise, or that is another model.
    """
    run, recipe, reporter, prompt = session.run, session.recipe, session.reporter, session.prompt
    assert run is not None
    files = gguf_files(recipe.name, recipe.export.gguf)
    trained = _Trained(session, data)
    adapter = Adapter.load(run.path / "train" / "adapter", session.decoder.config)
    if not has_llamacpp():
        reporter.say(f"export: GGUF files are not tried in llama.cpp, which is not installed: {INSTALL}")
    found: dict[str, Any] = {}
    answers: list[dict[str, Any]] = [{"question": q, "base_and_adapter": a} for q, a in trained.answers]
    for kind, file in files.items():
        weights = MergedWeights(session.source, adapter, held)
        try:
            with reporter.meter(f"gguf {kind}", len(weights.names), "tensors") as meter:
                write_gguf(folder / file, weights, prompt, kind, recipe.name, meter.advance)
        finally:
            weights.close()
        one, theirs = trained.judge(folder / file, kind)
        found[kind] = one
        for record, answer in zip(answers, theirs, strict=False):
            record[kind] = answer.text
        reporter.say(_sentence(file, kind, one), style=None if one["effect_kept"] >= 0.5 else "yellow")
    best = next(kind for kind in _PREFERRED if kind in found)
    # The first four are what the card shows of any export.
    shown = {key: found[best][key] for key in ("logit_difference", "adapter_effect", "greedy_agreement", "positions")}
    parity = {**shown, "shown_file": files[best], "files": found}
    write_json(folder / "parity.json", parity)
    if trained.ids:
        # Not in the folder that is published: these are rows of the data.
        write_json(run.path / "export" / "gguf_answers.json", answers)
    others = [file for kind, file in files.items() if kind != best]
    note = f"ollama create {recipe.name} -f Modelfile" + (f"\nAlso here: {', '.join(others)}" if others else "")
    text = modelfile(prompt, files[best], _parameters(session), note)
    (folder / "Modelfile").write_text(text, encoding="utf-8")
    write_card(folder, "gguf", run.manifest, parity)
    return parity


def _parameters(session: Session) -> dict[str, Any]:
    tokenizer = session.tokenizer
    values: dict[str, Any] = {"temperature": tokenizer.temperature or 0.0}
    if tokenizer.temperature is not None:
        values["top_p"] = tokenizer.top_p or 1.0
    values["repeat_penalty"] = session.recipe.compare.repetition_penalty
    values["num_ctx"] = min(session.decoder.config.max_position_embeddings, _CONTEXT)
    return values


class _Trained:
    """Base + adapter as trained: its logits on held-out rows and its greedy answers to held-out questions."""

    def __init__(self, session: Session, data: PreparedData):
        pairs = (data.held_out or data.train)[:ANSWERS]
        self.session = session
        self.rows = openings([encoded for _, encoded in (data.held_out or data.train)])
        self.questions = [row.question for row, _ in pairs]
        decoder, adapter = session.decoder, session.adapter
        self.tuned = logits_of(decoder, adapter, self.rows, trained=True)
        self.base = logits_of(decoder, None, self.rows, trained=True)
        self.ids: list[list[int]] = []
        if has_llamacpp():
            generator = Generator(decoder, adapter, session.prompt.stop_ids, slots=ANSWERS)
            sampling = Sampling(max_new_tokens=ANSWER_TOKENS, temperature=0.0)
            asked = [
                Request(session.prompt.prompt_ids(question), sampling, TUNED, number)
                for number, question in enumerate(self.questions)
            ]
            written = {done.request.key: done.ids for done in generator.run(asked)}
            self.ids = [written[number] for number in range(len(asked))]

    @property
    def answers(self) -> list[tuple[str, str]]:
        """Questions and answers, the latter empty where llama.cpp is not there to be compared."""
        texts = [self.session.tokenizer.decode(ids) for ids in self.ids] or [""] * len(self.questions)
        return list(zip(self.questions, texts, strict=True))

    def judge(self, file: Path, kind: str) -> tuple[dict[str, Any], list[LlamaAnswer]]:
        """Measure one file. Raises ParityError."""
        decoder = self.session.decoder
        version, theirs = self._asked(file) if has_llamacpp() else ("", [])
        wrote = [as_row(answer) for answer in theirs if answer.ids]
        weights = GGUFWeights(file, decoder.compute_dtype)
        rows = [*self.rows, *wrote]
        every = streamed_logits(weights, rows, decoder.compute_dtype, decoder.device, trained=True)
        close = closeness(every[: len(self.tuned)], self.tuned, self.base)
        if close.broken or (close.lost and kind in _FINE):
            raise ParityError(
                f"{file.name} is not the trained model: its logits differ by {close.logit_difference:.3f}, where they "
                f"spread by {close.spread:.3f}, and {close.effect_kept:.0%} of the adapter's effect is in it",
                "nothing was exported; please report this with the run's manifest.json",
            )
        found = {"file": file.name, "bytes": file.stat().st_size, **asdict(close)}
        if wrote:
            parity = self._compared(version, theirs, wrote, every[len(self.tuned) :])
            if parity.same_file < FAITHFUL and parity.logprob_difference > APART:
                raise ParityError(
                    f"llama.cpp reads {file.name} otherwise than we do: only {parity.same_file:.0%} of its "
                    f"{parity.tokens} tokens are what our decoder gives for this file",
                    "nothing was exported; please report this with the run's manifest.json",
                )
            found["llama_cpp"] = asdict(parity)
        return found, theirs

    def _asked(self, file: Path) -> tuple[str, list[LlamaAnswer]]:
        prompt = self.session.prompt
        chats = []
        for question in self.questions:
            system = [{"role": "system", "content": prompt.system}] if prompt.system is not None else []
            chats.append([*system, {"role": "user", "content": question.strip()}])
        expected = [prompt.prompt_ids(question) for question in self.questions]
        room = max(map(len, expected)) + ANSWER_TOKENS + 8
        version, theirs = llamacpp_answers(file, chats, ANSWER_TOKENS, room)
        for question, ids, answer in zip(self.questions, expected, theirs, strict=True):
            if answer.prompt_ids != ids:
                at = next(
                    (n for n, (a, b) in enumerate(zip(ids, answer.prompt_ids, strict=False)) if a != b),
                    min(len(ids), len(answer.prompt_ids)),
                )
                raise ParityError(
                    f"llama.cpp cuts a prompt otherwise: token {at} of {question[:40]!r} is "
                    f"{answer.prompt_ids[at : at + 3]}, in training {ids[at : at + 3]}",
                    "nothing was exported; please report this with the run's manifest.json",
                )
        return version, theirs

    def _compared(
        self, version: str, theirs: list[LlamaAnswer], wrote: list[EncodedRow], from_file: torch.Tensor
    ) -> LlamaParity:
        session = self.session
        tuned = logits_of(session.decoder, session.adapter, wrote, trained=True)
        tokens = torch.tensor([id for answer in theirs for id in answer.ids])
        apart = logprobs_apart(theirs, from_file)
        stops = set(session.prompt.stop_ids)
        same = sum(
            [id for id in answer.ids if id not in stops] == ids for answer, ids in zip(theirs, self.ids, strict=True)
        )
        return LlamaParity(
            version=version,
            questions=len(theirs),
            tokens=len(tokens),
            greedy_agreement=float((tuned.argmax(-1) == tokens).float().mean()),
            same_file=float((from_file.argmax(-1) == tokens).float().mean()),
            logprob_difference=float(apart.mean()),
            same_answers=same,
        )


def logprobs_apart(answers: Sequence[LlamaAnswer], logits: torch.Tensor) -> torch.Tensor:
    """Distances (nats, fp64) of llama.cpp's log probabilities of its tokens from those by ``logits`` (tokens, V)."""
    ids = [id for answer in answers for id in answer.ids]
    said = [value for answer in answers for value in answer.logprobs]
    ours = logits.double().log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
    apart = [abs(mine - theirs) for mine, theirs in zip(ours, said, strict=True) if theirs is not None]
    return torch.tensor(apart or [0.0], dtype=torch.float64)


def as_row(answer: LlamaAnswer) -> EncodedRow:
    """A row whose labels are the tokens llama.cpp wrote."""
    ids = [*answer.prompt_ids, *answer.ids]
    start = len(answer.prompt_ids)
    return EncodedRow(ids, [IGNORE_INDEX] * start + answer.ids, (start, start), (start, len(ids)))


def _sentence(file: str, kind: str, one: dict[str, Any]) -> str:
    text = (
        f"export: {file} ({one['bytes'] / 1e6:,.0f} MB): {kind} keeps {one['effect_kept']:.1%} of what the adapter "
        f"changes (KL {one['kl']:.4f} nats a token, {one['greedy_agreement']:.1%} greedy agreement on "
        f"{one['positions']} held-out tokens)"
    )
    if there := one.get("llama_cpp"):
        text += (
            f"; llama.cpp writes what base + adapter would in {there['greedy_agreement']:.1%} of {there['tokens']} "
            f"tokens, {there['same_answers']} of {there['questions']} answers equal"
        )
    return text
