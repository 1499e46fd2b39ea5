"""Installation of CLLM."""

from setuptools import find_packages, setup

setup(
    name="cllm",
    version="0.1.0",
    description="Consistency large language models: decode several tokens per forward pass with a plain checkpoint",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["cllm", "cllm.*"]),
    package_data={"cllm": ["train_cllm.sh", "configs/*.yaml", "serving/demo/page.html"]},
    install_requires=[
        "torch>=2.8",
        "transformers>=5.16,<6",
        "datasets>=4",
        "accelerate>=1.15",
        "tqdm",
        "math-verify>=0.8",
        "jinja2",
        "xxhash>=3",
    ],
    extras_require={
        "chat": ["rich"],
        "gguf": ["gguf"],
        "plot": ["matplotlib"],
        "flash-attn": ["flash-attn"],
        "deepspeed": ["deepspeed"],
        "lora": ["peft>=0.18"],
        "qlora": ["peft>=0.18", "bitsandbytes"],
        "fastchat": ["fschat"],
        "serve": ["fastapi", "uvicorn", "prometheus-client"],
        "spider": ["sqlglot"],
        "dev": ["pytest", "hypothesis", "ruff", "mypy", "pytest-timeout", "pytest-xdist"],
    },
    entry_points={"console_scripts": ["cllm = cllm.cli.main:main"]},
)
