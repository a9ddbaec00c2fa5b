#!/bin/sh
# What the machine must bring: Python 3.11 and Java 17 or 21.
#   infra/prerequisites.sh python   prints the Python to use, or one line on stderr and exit 1
#   infra/prerequisites.sh java     silent, or one line on stderr and exit 1
# Python is $PYTHON, else the first of python3.11, python3 on PATH that is 3.11; Java is $JAVA_HOME's, else PATH's, as Spark chooses it.
set -u

fail() {
    echo "studbook: $1" >&2
    exit 1
}

python_version() { # command -> "3.11.7", or nothing when it cannot be run
    "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null
}

check_python() {
    found=""
    for candidate in ${PYTHON:-python3.11 python3}; do
        version=$(python_version "$candidate") || continue
        case $version in
            3.11.*)
                command -v uv >/dev/null || "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
                    fail "found Python $version ($candidate) without venv, and no uv; needed: one of them; get it: apt-get install python3.11-venv"
                command -v "$candidate"
                return
                ;;
        esac
        found="${found:+$found and }Python $version ($candidate)"
    done
    fail "found ${found:-no ${PYTHON:-python3.11 or python3}}; needed: Python 3.11 (the lock is for it); get it: apt-get install python3.11 python3.11-venv, or pyenv install 3.11, then make PYTHON=/path/to/python3.11"
}

check_java() {
    needed="needed: Java 17 or 21 (Spark 4); get it: apt-get install openjdk-17-jre-headless, then set JAVA_HOME to it"
    if [ -n "${JAVA_HOME:-}" ]; then
        java=$JAVA_HOME/bin/java
        [ -x "$java" ] || fail "found JAVA_HOME=$JAVA_HOME, but no program at $java; $needed"
    else
        java=$(command -v java) || fail "found no java on PATH and no JAVA_HOME; $needed"
    fi
    # openjdk version "17.0.15" 2025-04-15, or for old ones: java version "1.8.0_392"
    version=$("$java" -version 2>&1 | sed -n 's/.* version "\([^"]*\)".*/\1/p' | head -n 1)
    case $version in
        17 | 17.* | 21 | 21.*) ;;
        *) fail "found Java ${version:-of unknown version} ($java); $needed" ;;
    esac
    "$java" --list-modules 2>/dev/null | grep -q '^jdk\.incubator\.vector' ||
        fail "found Java $version ($java), a slim runtime without the module jdk.incubator.vector that Spark 4 starts with; $needed"
}

case ${1:-} in
    python) check_python ;;
    java) check_java ;;
    *) fail "usage: infra/prerequisites.sh python|java" ;;
esac
