from importlib.util import find_spec

# Where vLLM is not installed, what needs no vLLM is tested all the same.
collect_ignore = (
    [] if find_spec("vllm") else [f"vllm_slq/{name}.py" for name in ("config", "families", "models", "pooler")]
)
