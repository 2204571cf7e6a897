"""carserver: the shared recorder and control point of AI-agent runs. JSON-RPC 2.0 over WebSocket."""

__version__ = "0.1.0"
