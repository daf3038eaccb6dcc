"""Training: the paper's loss, learning rates, an estimate before the run, several query sets in one run."""

from slq_embed.training.cached_loss import CachedSymmetricInfoNCELoss
from slq_embed.training.learning_rates import learning_rate_mapping
from slq_embed.training.losses import SymmetricInfoNCELoss
from slq_embed.training.plan import Option, Plan, plan_prefixes
from slq_embed.training.sweep import Sweep, Variant, sweep

__all__ = [
    "CachedSymmetricInfoNCELoss",
    "Option",
    "Plan",
    "Sweep",
    "SymmetricInfoNCELoss",
    "Variant",
    "learning_rate_mapping",
    "plan_prefixes",
    "sweep",
]
