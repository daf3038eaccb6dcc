"""Learning rates of what is trained beside the latent queries."""

from __future__ import annotations

from slq_embed.encoder import SLQEncoder

PROJECTION, QUERY_ADAPTER, DEEP_QUERIES = 5e-4, 5e-4, 2e-2


def learning_rate_mapping(
    model: SLQEncoder,
    *,
    projection: float = PROJECTION,
    query_adapter: float = QUERY_ADAPTER,
    deep_queries: float = DEEP_QUERIES,
) -> dict[str, float]:
    """Learning rates for ``SentenceTransformerTrainingArguments(learning_rate_mapping=...)``.

    Queries start far from where they end, so they need a rate (``learning_rate``, about 2e-2) at which a head or an adapter,
    which starts as if it were not there, would be thrown about. So those have parameter groups of their own.

    Args:
        model: The encoder to train.
        projection: Rate of the projection head.
        query_adapter: Rate of the query adapter.
        deep_queries: Rate of the vectors that are added before each layer.

    Returns:
        Rates by regular expressions of parameter names; only for what the model has, and so empty for queries alone. The
        queries, their weights and the temperature keep ``learning_rate``.
    """
    parts = {
        r"\b2\.linear\.": projection if model.slq_config.projection is not None else None,
        r"\b0\.query_adapter\.": query_adapter if model.slq_config.query_adapter is not None else None,
        r"\bbias\.deep_queries$": deep_queries if model.slq_config.deep_queries else None,
    }
    return {pattern: rate for pattern, rate in parts.items() if rate is not None}
