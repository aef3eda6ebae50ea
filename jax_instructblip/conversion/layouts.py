"""The layouts that a checkpoint can be exported to, by the name that users choose them by."""

LAYOUTS = {
    "hf": "Hugging Face's layout",
    "original": "original LLaVA's layout",
    "projector": "original LLaVA's layout of a projector",
}
