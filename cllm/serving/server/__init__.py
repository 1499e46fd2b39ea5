"""A server that speaks the OpenAI protocol (FastAPI and uvicorn, extra ``[serve]``)."""
