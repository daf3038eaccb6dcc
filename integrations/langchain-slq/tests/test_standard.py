"""LangChain's own tests of what an embeddings class must do."""

from __future__ import annotations

import pytest
from langchain_tests.integration_tests import EmbeddingsIntegrationTests
from langchain_tests.unit_tests import EmbeddingsUnitTests
from slq_embed import pretrained

from langchain_slq import SLQEmbeddings


class OfSLQ:
    @property
    def embeddings_class(self) -> type[SLQEmbeddings]:
        return SLQEmbeddings

    @property
    def embedding_model_params(self) -> dict:
        return {"model": pretrained("slq-tiny"), "device": "cpu"}


class TestUnit(OfSLQ, EmbeddingsUnitTests):
    pass


@pytest.mark.filterwarnings("ignore:.*is marked with '@pytest.mark.asyncio' but it is not an async function")
@pytest.mark.asyncio  # where the repository's configuration is in force, asyncio_mode is strict
class TestIntegration(OfSLQ, EmbeddingsIntegrationTests):
    pass
