"""A server with a toy bundle, and OpenAI's client for it: one for each test file, because tests count its requests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.toys import write_toy_bundle

import gemma_edge
from gemma_edge.runtimes.generation.generate import GenerationOptions

if TYPE_CHECKING:
    from gemma_edge.runtimes.serve.engine import Engine

# What a fixture needs is imported in it: the test files are skipped by name where it is not installed.


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_bundle(tmp_path_factory.mktemp("serve") / "bundle")


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Engine:
    from gemma_edge.runtimes.serve.engine import Engine

    return Engine(gemma_edge.load(bundle, threads=1), GenerationOptions())


@pytest.fixture(scope="module")
def port(engine: Engine) -> Iterator[int]:
    from support.serving import in_a_thread

    with in_a_thread(engine) as port:
        yield port


@pytest.fixture(scope="module")
def client(port: int) -> Any:
    import openai

    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
