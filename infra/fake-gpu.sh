#!/bin/sh
# A GPU discovery script for machines without one: Spark schedules the address as it would a real GPU's.
# standalone.sh gives each worker its own address, as hosts with one GPU for each worker do.
echo "{\"name\": \"gpu\", \"addresses\": [\"${STUDBOOK_FAKE_GPU:-0}\"]}"
