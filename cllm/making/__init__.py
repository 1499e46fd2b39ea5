"""From a model and prompts to the same model, faster: what ``cllm make`` does."""
