#!/usr/bin/env bash
# Runs a command on every host of a slice at once, and prefixes each line of output with its host:
#
#   tpu/run_all_hosts.sh NAME ZONE 'cd rmr1 && .venv/bin/rmr1 sft configs/sft_qwen2.5_7b.yaml out=/mnt/runs/sft_7b'
#
# NAME is the managed instance group of tpu/gce_mig.sh, or with TPU_API=1 a TPU of the Cloud TPU API (v5e).
# If the hosts do not find each other (tpu/doctor.py reports that), EXPLICIT=1 sets RMR1_COORDINATOR and
# the like; not with TPU_API.
# RESTARTS=N restarts the command up to N times after exit code 42 (preempted) or 127-255 (a host was lost).
#
# The exit code is the smallest of the hosts' that is not 0: when one host fails for a reason of its own, the others
# follow with codes from 127 on. The command ends when this script does: run it on a machine that stays on.
set -euo pipefail
[ $# -eq 3 ] || { sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
name="$1" zone="$2" command="$3"

hosts() {
    if [ -n "${TPU_API:-}" ]; then
        local count
        count="$(gcloud compute tpus tpu-vm describe "$name" --zone="$zone" --format='value(networkEndpoints.len())')"
        seq 0 $((count - 1))
    else
        gcloud compute instance-groups managed list-instances "$name" --zone="$zone" --format='value(name)'
    fi
}

on_host() {
    if [ -n "${TPU_API:-}" ]; then
        gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker="$1" --command="$2"
    else
        gcloud compute ssh "$1" --zone="$zone" --command="$2"
    fi </dev/null 2>&1 | sed -u "s/^/$1: /"
}

once() {
    local found host variables="" code result=0 pids=()
    found=($(hosts))
    [ ${#found[@]} -gt 0 ] || { echo "error: $name in $zone has no hosts" >&2; return 2; }
    for host in "${found[@]}"; do
        if [ -n "${EXPLICIT:-}" ]; then
            variables="export RMR1_COORDINATOR=${found[0]}:8482 RMR1_PROCESSES=${#found[@]} RMR1_PROCESS=${#pids[@]}; "
        fi
        on_host "$host" "$variables$command" &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do
        code=0
        wait "$pid" || code=$?
        if [ "$code" -ne 0 ] && { [ "$result" -eq 0 ] || [ "$code" -lt "$result" ]; }; then result=$code; fi
    done
    return "$result"
}

for attempt in $(seq 0 "${RESTARTS:-0}"); do
    result=0
    once || result=$?
    if [ "$result" -ne 42 ] && [ "$result" -lt 127 ]; then break; fi
    [ "$attempt" -eq "${RESTARTS:-0}" ] && break
    echo "ended with $result; starting again in ${RESTART_DELAY:-30} s ($((attempt + 1)) of $RESTARTS)" >&2
    sleep "${RESTART_DELAY:-30}"
done
exit "$result"
