"""Print the lowest versions of the hosts that pyproject.toml allows, as requirements for pip."""

from importlib.metadata import requires

from packaging.requirements import Requirement

HOSTS = ("peft", "sentence-transformers", "transformers")

for requirement in map(Requirement, requires("slq-embed") or []):
    if requirement.name in HOSTS:
        (version,) = [clause.version for clause in requirement.specifier if clause.operator == ">="]
        print(f"{requirement.name}=={version}")
