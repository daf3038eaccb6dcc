"""Training: the paper's loss, an estimate before the run, several query sets in one run."""

from slq_embed.training.losses import SymmetricInfoNCELoss
from slq_embed.training.plan import Option, Plan, plan_prefixes
from slq_embed.training.sweep import Sweep, Variant, sweep

__all__ = ["Option", "Plan", "Sweep", "SymmetricInfoNCELoss", "Variant", "plan_prefixes", "sweep"]
