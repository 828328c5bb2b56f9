"""What agents do and did: gathered from this host and others, summed up, shown in a terminal, as a page and as a trace."""

from etha_ray.status.gather import gather
from etha_ray.status.overview import Overview, overview
from etha_ray.status.page import page
from etha_ray.status.text import shown
from etha_ray.status.trace import trace_events

__all__ = ["Overview", "gather", "overview", "page", "shown", "trace_events"]
