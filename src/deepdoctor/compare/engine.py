"""Who writes the answers: our own engine on the weights that are loaded, or a vLLM server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from deepdoctor.data.prompt import Prompt
from deepdoctor.model.adapter import Adapter
from deepdoctor.model.generate import Generator, Words
from deepdoctor.model.vllm_engine import VllmGenerator
from deepdoctor.model.vllm_server import open_vllm
from deepdoctor.session import Session

__all__ = ["MakeGenerator", "answering"]

MakeGenerator = Callable[[Prompt, Mapping[str, Adapter], Words], Generator | VllmGenerator]
"""Prompt, whose stop tokens end answers, adapters by side and words -> a generator."""
SHARE_BESIDE = "0.5"
"""Of the GPU, for a vLLM server that we start while the base is loaded here too."""


@contextmanager
def answering(session: Session, folders: Mapping[str, Path]) -> Iterator[MakeGenerator]:
    """Give what makes a generator, for as long as the recipe's engine is up.

    folders: side -> PEFT folder, for a vLLM server that is started here. Raises EngineError for one that does not come
    up or cannot be reached.
    """
    section = session.recipe.compare
    if section.engine == "deepdoctor":
        yield lambda prompt, adapters, words: Generator(
            session.decoder,
            adapters,
            prompt.stop_ids,
            section.batch_size,
            session.reduced,
            words,
            kv_format=section.kv_cache,
        )
        return
    decoder = session.decoder
    beside = ("--gpu-memory-utilization", SHARE_BESIDE) if decoder.device.type == "cuda" else ()
    with ExitStack() as stack:
        server = stack.enter_context(
            open_vllm(
                session.prompt.stop_ids,
                url=section.vllm_url,
                python=section.vllm_python and Path(section.vllm_python).expanduser(),
                base=session.source,
                adapters=folders,
                dtype=str(decoder.compute_dtype).removeprefix("torch."),
                slots=section.batch_size,
                words=session.words,
                positions=decoder.config.max_position_embeddings,
                arguments=beside,
            )
        )
        session.reporter.say(f"compare: answers come from vLLM {server.version() or ''} at {server.link.url}")
        if decoder.precision == "nf4":
            session.reporter.say(
                "compare: vLLM answers over the 16-bit base, training saw it in NF4: losses and answers differ by that"
            )

        def make(prompt: Prompt, adapters: Mapping[str, Adapter], words: Words) -> VllmGenerator:
            server.stop_ids, server.words = frozenset(prompt.stop_ids), words
            return server

        yield make
