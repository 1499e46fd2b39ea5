"""Run vLLM in a process of its own, as a test says:  python vllm_texts.py JOB RESULT

JOB is JSON: ``model``, ``drafts`` (0: plain AR), ``engine`` (more arguments of vLLM's LLM), and ``runs``, each with ``prompts``
(token ids), ``sampling`` (arguments of SamplingParams) and ``alone`` (one request after the other). RESULT gets for each run the
``texts`` of every choice (token ids; with stop strings the text, since a step may write more tokens than it shows), the ``steps``
that had drafts and the drafts ``accepted``; and how often requests were ``preempted`` altogether.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}


def main() -> None:
    from vllm import LLM

    from cllm.engines.vllm_server import PROPOSER

    job = json.loads(Path(sys.argv[1]).read_text())
    speculative = {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": job["drafts"]}
    drafting = {"speculative_config": speculative} if job["drafts"] else {}
    common = {"dtype": "float32", "enforce_eager": True, "disable_log_stats": False, "max_model_len": 1024}
    llm = LLM(job["model"], **common | drafting | job.get("engine", {}))
    results = [run(llm, **each) for each in job["runs"]]
    Path(sys.argv[2]).write_text(json.dumps({"runs": results, "preempted": counters(llm)["num_preemptions"]}))


def run(llm: Any, prompts: list[list[int]], sampling: dict[str, Any], alone: bool = False) -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    if "json" in sampling:
        sampling["structured_outputs"] = StructuredOutputsParams(json=sampling.pop("json"))
    how, before = SamplingParams(**sampling), counters(llm)
    requests = [{"prompt_token_ids": ids} for ids in prompts]
    batches = [[request] for request in requests] if alone else [requests]
    outputs = [output for batch in batches for output in llm.generate(batch, how, use_tqdm=False)]
    after = counters(llm)
    return {
        "texts": [[choice.text if "stop" in sampling else list(choice.token_ids) for choice in output.outputs] for output in outputs],
        "steps": after["spec_decode_num_drafts"] - before["spec_decode_num_drafts"],
        "accepted": after["spec_decode_num_accepted_tokens"] - before["spec_decode_num_accepted_tokens"],
    }


def counters(llm: Any) -> dict[str, int]:
    """vLLM's counters by their names, 0 for those that it does not have without drafts."""
    names = ("num_preemptions", "spec_decode_num_drafts", "spec_decode_num_accepted_tokens")
    values = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return {name: int(values.get(f"vllm:{name}", 0)) for name in names}


if __name__ == "__main__":
    main()
