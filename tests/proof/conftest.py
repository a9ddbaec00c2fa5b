"""The cluster and the Spark session of the long fault tests."""

from __future__ import annotations

from tests.cluster.conftest import cluster, empty_lake, make_lake, spark

__all__ = ["cluster", "empty_lake", "make_lake", "spark"]
