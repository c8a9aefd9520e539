from __future__ import annotations
def ensure(model, target): pass
