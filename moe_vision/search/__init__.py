"""Which experts? Sets of them are tried one round after the other, and the report says what can be told apart."""

from moe_vision.search.config import SearchConfig
from moe_vision.search.methods import SearchError
from moe_vision.search.search import planned_search, search

__all__ = ["SearchConfig", "SearchError", "planned_search", "search"]
