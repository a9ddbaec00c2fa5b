#!/usr/bin/env bash
# A real standalone Spark cluster on this machine, on loopback only, from the PyPI pyspark:
#
#   infra/standalone.sh start [WORKERS]    starts a master and 2 (or WORKERS) workers, prints the master's URL
#   infra/standalone.sh stop               ends the processes that `start` started, and no other
#
# Each worker declares one GPU through fake-gpu.sh (addresses 0, 1, ...). Then for example
#
#   spark-submit --master spark://127.0.0.1:PORT --properties-file infra/spark-standalone.conf jobs/run_all.py --config ...
#
# Settings by environment: PYTHON (a Python with pyspark), STANDALONE_DIR (pids, logs, work; default .cache/standalone),
# WORKER_CORES, WORKER_MEMORY. Pids stand in STANDALONE_DIR/master.pid, worker-0.pid, ...
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
state=${STANDALONE_DIR:-$here/../.cache/standalone}
python=${PYTHON:-$here/../.venv/bin/python}

launch() { # name, class, arguments: starts a Spark daemon in the background and remembers its pid
    local name=$1
    shift
    nohup "$SPARK_HOME/bin/spark-class" "$@" </dev/null >"$state/$name.log" 2>&1 &
    echo $! >"$state/$name.pid"
}

wait_for() { # name, sed expression: prints what the expression finds in the daemon's log; gives up after 60 s or when it ends
    local found
    for _ in $(seq 600); do
        found=$(sed -n "$2" "$state/$1.log" | head -n 1)
        if [ -n "$found" ]; then
            echo "$found"
            return
        fi
        kill -0 "$(cat "$state/$1.pid")" 2>/dev/null || break
        sleep 0.1
    done
    echo "standalone: $1 did not start; see $state/$1.log" >&2
    stop
    exit 1
}

start() {
    local workers=${1:-2} url
    [ -x "$python" ] || { echo "standalone: found no Python at $python; run 'make env' or set PYTHON" >&2; exit 1; }
    if compgen -G "$state/*.pid" >/dev/null; then
        echo "standalone: a cluster was started from $state; stop it first: infra/standalone.sh stop" >&2
        exit 1
    fi
    mkdir -p "$state"
    SPARK_HOME=$("$python" -c 'import pyspark, os; print(os.path.dirname(pyspark.__file__))')
    export SPARK_HOME SPARK_LOCAL_IP=127.0.0.1
    export PYSPARK_PYTHON=${PYSPARK_PYTHON:-$python} # else executors take the system's Python

    launch master org.apache.spark.deploy.master.Master --host 127.0.0.1 --port 0 --webui-port 0
    url=$(wait_for master 's/.*Starting Spark master at \(spark:[^ ]*\).*/\1/p')
    export SPARK_WORKER_OPTS="-Dspark.worker.resource.gpu.amount=1 -Dspark.worker.resource.gpu.discoveryScript=$here/fake-gpu.sh"
    for number in $(seq 0 $((workers - 1))); do
        STUDBOOK_FAKE_GPU=$number launch "worker-$number" org.apache.spark.deploy.worker.Worker \
            --host 127.0.0.1 --port 0 --webui-port 0 --cores "${WORKER_CORES:-1}" --memory "${WORKER_MEMORY:-1536m}" \
            --work-dir "$state/work-$number" "$url"
    done
    for number in $(seq 0 $((workers - 1))); do
        wait_for "worker-$number" 's/.*\(Successfully registered with master\).*/\1/p' >/dev/null
    done
    echo "$url"
}

is_ours() { # pid: whether it is a Spark daemon; a number from a pid file may have passed to another process
    tr '\0' ' ' <"/proc/$1/cmdline" 2>/dev/null | grep -q 'org.apache.spark.deploy.\(master.Master\|worker.Worker\)'
}

stop() {
    local file pid
    for file in "$state"/*.pid; do
        [ -e "$file" ] || continue
        pid=$(cat "$file")
        if is_ours "$pid"; then kill "$pid"; fi
    done
    for file in "$state"/*.pid; do
        [ -e "$file" ] || continue
        pid=$(cat "$file")
        for _ in $(seq 100); do
            is_ours "$pid" || break
            sleep 0.1
        done
        if is_ours "$pid"; then kill -9 "$pid"; fi
        rm -f "$file"
    done
}

case ${1:-} in
    start) start "${2:-2}" ;;
    stop) stop ;;
    *) sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
