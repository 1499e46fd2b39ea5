"""Other programs that run models: a CLLM inside them, and responses from them."""
