"""Questions to an OpenAI-compatible chat endpoint, resumable and within a budget of tokens.

`asking.ask` sends requests and returns usable answers. `journal` keeps every reply on disk, so that
an interrupted run asks nothing twice; `client` sends one request; `settings` says which model
answers, how, and how failures are handled.
"""
