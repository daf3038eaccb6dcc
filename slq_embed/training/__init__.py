"""Training: the paper's loss, hard negatives, a teacher's scores, learning rates, a plan, several query sets in one run."""

from slq_embed.training.cached_loss import CachedSymmetricInfoNCELoss
from slq_embed.training.learning_rates import learning_rate_mapping
from slq_embed.training.losses import SymmetricInfoNCELoss
from slq_embed.training.negatives import mine_negatives
from slq_embed.training.plan import Option, Plan, plan_prefixes
from slq_embed.training.sweep import Sweep, Variant, sweep
from slq_embed.training.teacher import teacher_scores

__all__ = [
    "CachedSymmetricInfoNCELoss",
    "Option",
    "Plan",
    "Sweep",
    "SymmetricInfoNCELoss",
    "Variant",
    "learning_rate_mapping",
    "mine_negatives",
    "plan_prefixes",
    "sweep",
    "teacher_scores",
]
