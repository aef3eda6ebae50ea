"""Makes instruction data as LLaVA did: a language model writes dialogues about described images.

`prompts` reads what the model is told and shown, `rounds` reads its answers, `generate` asks for
all images and writes the conversations. `prompts/` holds the texts that ship.
"""
