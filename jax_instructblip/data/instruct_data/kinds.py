"""The three kinds of requests, and whether the model is shown the boxes of objects too."""

KINDS = {"conversation": False, "detail_description": True, "complex_reasoning": True}
