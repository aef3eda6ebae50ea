"""Questions to an OpenAI-compatible chat endpoint, resumable and within a budget of tokens.

`asking.ask` sends requests and returns usable answers. `journal` keeps every reply on disk, so that
no answered request is sent again after an interruption; `client` sends one request; `settings` says
which model answers, how, and how failures are handled.
"""
