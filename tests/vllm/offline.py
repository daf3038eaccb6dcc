"""vLLM without a server: one process imports it once, and a copy of that process embeds with each model.

Run by the Python of vLLM. Each line of its input is a job: a ``model``, a file of chats, where the vectors go, and ``settings`` of
:class:`vllm.LLM`. Each line that it writes is an answer: ``{}``, or why there are no vectors.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def embed(llm: Any, chats: list[Any]) -> list[list[float]]:
    """Embeddings of chats, in steps that compute as many of them as fit."""
    from vllm import PoolingParams, PoolingRequestOutput

    for prompt in llm._preprocess_chat(chats):
        llm._add_request(prompt, PoolingParams(task="embed"))
    return [output.outputs.data.tolist() for output in llm._run_engine(PoolingRequestOutput, use_tqdm=False)]


def work(job: dict[str, Any]) -> None:
    """Embed each chat alone, alone again, and all in a batch."""
    import numpy as np
    from vllm import LLM

    chats = json.loads(Path(job["chats"]).read_text("utf8"))
    llm = LLM(
        job["model"],
        runner="pooling",
        distributed_executor_backend="uni",
        **{"dtype": "float32", "enforce_eager": True, **job["settings"]},
    )
    assert llm.llm_engine.vllm_config.use_v2_model_runner == ("VLLM_USE_V2_MODEL_RUNNER" in os.environ)
    alone = [embed(llm, [chat])[0] for chat in chats]
    again = [embed(llm, [chat])[0] for chat in chats]
    np.save(job["vectors"], np.array([alone, again, embed(llm, chats)], np.float32))


def in_a_copy(job: dict[str, Any]) -> dict[str, str]:
    """Do a job in a copy of this process, which takes with it what vLLM keeps of a model."""
    read, write = os.pipe()
    if child := os.fork():
        os.close(write)
        with os.fdopen(read) as answer:
            error = answer.read()
        _, status = os.waitpid(child, 0)
        return {"error": error or f"status {status}"} if error or status else {}
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        work(job)
    except BaseException as error:  # the copy must not go on with its parent's lines
        traceback.print_exc()
        os.write(write, f"{type(error).__name__}: {error}".encode())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def answer(values: dict[str, str]) -> None:
    """Write a line."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def main() -> None:
    from interpreted import interpret_if_asked, use_torch_for_bfloat16

    interpret_if_asked()
    import vllm.entrypoints.llm
    import vllm.model_executor.models.registry as registry
    import vllm.v1.engine.core
    import vllm.v1.worker.cpu_worker  # noqa: F401 - here, and not in each copy

    use_torch_for_bfloat16()
    registry._run_in_subprocess = lambda asked: asked()  # there is a process for each model as it is
    answer({})
    for line in sys.stdin:
        answer(in_a_copy(json.loads(line)))


if __name__ == "__main__":
    main()
