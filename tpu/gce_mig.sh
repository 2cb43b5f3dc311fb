#!/usr/bin/env bash
# Manages a TPU slice as a managed instance group of Compute Engine (v5p, v6e, tpu7x; v5e needs the Cloud TPU API):
#
#   tpu/gce_mig.sh create NAME v6e:4x4 us-east5-b       a workload policy, a template and a group, all called NAME
#   tpu/gce_mig.sh list   NAME v6e:4x4 us-east5-b       PENDING, STAGING, RUNNING: capacity may take long
#   tpu/gce_mig.sh delete NAME v6e:4x4 us-east5-b       all three; a group recreates machines that are deleted alone
#
# MODEL=SPOT (default), FLEX_START (with DURATION, default 7d), STANDARD or RESERVATION_BOUND (with RESERVATION).
# DRY_RUN=1 prints the commands of create and delete.
set -euo pipefail
[ $# -eq 4 ] || { sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
action="$1" name="$2" slice="$3" zone="$4"
region="${zone%-*}" topology="${slice#*:}"
family=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e

case "${slice%%:*}" in
    v5p) machine=ct5p-hightpu-4t ;;
    v6e) machine=ct6e-standard-4t ;;
    tpu7x) machine=tpu7x-standard-4t family=ubuntu-accel-2404-amd64-tpu-tpu7x ;;
    *) echo "error: $slice is not v5p:AxBxC, v6e:AxB or tpu7x:AxBxC" >&2; exit 2 ;;
esac
chips=$((${topology//x/*}))
if [ $((chips % 4)) -ne 0 ]; then
    echo "error: $slice has $chips chips; expected a multiple of 4, the chips of a host" >&2
    exit 2
fi

gcloud_run() {
    if [ -n "${DRY_RUN:-}" ]; then echo "gcloud $*"; else gcloud "$@"; fi
}

create() {
    local project model="${MODEL:-SPOT}" how=()
    project="${PROJECT:-$(gcloud config get-value project)}"
    case "$model" in
        SPOT | STANDARD) ;;
        FLEX_START) how=(--max-run-duration="${DURATION:-7d}") ;;
        RESERVATION_BOUND) how=(--reservation-affinity=specific --reservation="${RESERVATION:?is not set}") ;;
        *) echo "error: MODEL=$model is not SPOT, FLEX_START, STANDARD or RESERVATION_BOUND" >&2; exit 2 ;;
    esac
    [ "$model" = STANDARD ] || how+=(--instance-termination-action=DELETE)
    gcloud_run compute resource-policies create workload-policy "$name" --project="$project" --region="$region" \
        --type=HIGH_THROUGHPUT --accelerator-topology="$topology"
    gcloud_run compute instance-templates create "$name" --project="$project" --instance-template-region="$region" \
        --machine-type="$machine" --provisioning-model="$model" "${how[@]}" --maintenance-policy=TERMINATE \
        --image-project=ubuntu-os-accelerator-images --image-family="$family" --boot-disk-size=200GB \
        --scopes=cloud-platform
    # bulk: all hosts or none. A policy or a template of one region must be given by its full name.
    gcloud_run compute instance-groups managed create "$name" --project="$project" --zone="$zone" \
        --template="projects/$project/regions/$region/instanceTemplates/$name" --size=0 \
        --workload-policy="projects/$project/regions/$region/resourcePolicies/$name" \
        --target-size-policy-mode=bulk --default-action-on-vm-failure=do-nothing
    gcloud_run compute instance-groups managed resize "$name" --project="$project" --zone="$zone" \
        --size=$((chips / 4))
}

delete() {
    gcloud_run compute instance-groups managed delete "$name" --zone="$zone" --quiet
    gcloud_run compute instance-templates delete "$name" --region="$region" --quiet
    gcloud_run compute resource-policies delete "$name" --region="$region" --quiet
}

case "$action" in
    create) create ;;
    list) gcloud compute instance-groups managed list-instances "$name" --zone="$zone" ;;
    delete) delete ;;
    *) echo "error: $action is not create, list or delete" >&2; exit 2 ;;
esac
