# Databricks notebook source
# %% [markdown]
# # A tour of the lake
# What the main job left, table by table. Runs on Databricks as it is (the session and the catalog are there), and anywhere
# else as plain Python: `python notebooks/tour.py conf/demo.yaml`.

# COMMAND ----------
# %%
import sys

from pyspark.sql import functions as F

from conf.settings import load
from jobs import session
from jobs.embedding import outputs
from jobs.lake import Lake
from jobs.tables import TABLES
from udfs.embed import PIXELS

config = sys.argv[1] if len(sys.argv) > 1 and sys.argv[1].endswith(".yaml") else "conf/demo.yaml"
settings = load(config)
lake = Lake(session.start(settings.spark), settings)

# COMMAND ----------
# %% [markdown]
# ## Every table, its rows and its version

# COMMAND ----------
# %%
rows = [(name, lake.read(name).count(), lake.version(name), ", ".join(table.key)) for name, table in TABLES.items()]
lake.spark.createDataFrame(rows, "table STRING, rows BIGINT, version BIGINT, key STRING").show(truncate=False)

# COMMAND ----------
# %% [markdown]
# ## One image, several sources
# The same bytes under two keys are one image.

# COMMAND ----------
# %%
several = lake.read("sources").groupBy("image_id").agg(F.collect_list(F.concat_ws("/", "source", "key")).alias("keys"))
several.where(F.size("keys") > 1).select(F.lower(F.hex("image_id")).alias("image"), "keys").show(5, truncate=60)

# COMMAND ----------
# %% [markdown]
# ## What could not be taken

# COMMAND ----------
# %%
lake.read("rejects").groupBy("stage", "code", "permanent").count().orderBy("stage", "code").show(50)

# COMMAND ----------
# %% [markdown]
# ## Scores, and what the pixel statistics say beside them

# COMMAND ----------
# %%
newest = lake.read("scores").agg(F.max_by("fingerprint", F.col("model_version").cast("int"))).collect()[0][0]
statistics = lake.read("pixels").where((F.col("view") == "original") & (F.col("fingerprint") == outputs(settings)[PIXELS]))
scored = lake.read("scores").where(F.col("fingerprint") == newest).join(statistics.drop("fingerprint", "run"), "image_id")
means = [F.round(F.avg(name), 2).alias(name) for name in ("contrast", "saturation", "sharpness", "entropy")]
scored.groupBy("tag").agg(F.count("*").alias("images"), *means).orderBy("tag").show()

# COMMAND ----------
# %% [markdown]
# ## Why images were dropped, and a what-if without recomputing anything
# `decisions` holds every rule that an image failed: how many images would come back if one rule were lifted?

# COMMAND ----------
# %%
latest = lake.read("decisions").agg(F.max_by("selection", "run")).collect()[0][0]
failed = lake.read("decisions").where((F.col("selection") == latest) & ~F.col("kept"))
only = failed.where(F.size("failed") == 1).select(F.col("failed")[0]["rule"].alias("rule")).groupBy("rule").count()
only.withColumnRenamed("count", "would come back").orderBy("rule").show()

# COMMAND ----------
# %% [markdown]
# ## The frozen exports

# COMMAND ----------
# %%
lake.read("exports").groupBy("kind", "export").agg(F.count("*").alias("files"), F.sum("rows").alias("rows")).show(truncate=False)
