"""The modules of an SLQ model in memory. A saved folder holds stock modules."""

from slq_embed.modules.latent_query_pooling import LatentQueryPooling
from slq_embed.modules.latent_query_transformer import LatentQueryTransformer
from slq_embed.modules.projection_head import ProjectionHead
from slq_embed.modules.query_adapter import QueryAdapter

__all__ = ["LatentQueryPooling", "LatentQueryTransformer", "ProjectionHead", "QueryAdapter"]
