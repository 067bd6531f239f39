#!/usr/bin/env bash
# A run on a Cloud TPU slice of one or many hosts.
#   bash launch/tpu_vm.sh VERB --name NAME --zone ZONE [--project P] [--dry-run] ...
#   create  --type v5litepod-16 --runtime v2-alpha-tpuv5-lite [--spot]   ask for it, wait for it
#   install [--nfs IP:/SHARE] [--extras tpu,gs]    copy the committed files to every host and install
#                                    them with those extras; mount the share at ~/share
#   run     -- --config C --workdir DIR ...    start gemma_lora.train on every host
#   logs    [--worker I]             follow what it prints, until it ends; exits as it did
#   stop    let the run save, and end; the same arguments continue it
#   resume  everything of create, install and run: where the slice was preempted, make it anew;
#           then run. The same arguments continue the run.
#   delete                           give the slice back
# On several hosts, and after a preemption, the workdir must outlive them: on a share, or
# gs://BUCKET/DIR. A ~ of the hosts wants quotes here: --workdir '~/share/run'.
# --dry-run prints the commands instead.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
verbs="create install run logs stop resume delete"
switches="dry-run" flags="name zone project"
case ${1:-} in
  create) switches+=" spot" flags+=" type runtime" ;;
  install) flags+=" nfs extras" ;;
  logs) flags+=" worker" ;;
  resume) switches+=" spot" flags+=" type runtime nfs extras" ;;
esac
dry_run="" name="" zone="" project="" type="" runtime="" spot="" nfs="" worker=0 extras=tpu,gs
# shellcheck source=launch/common.sh
. launch/common.sh

parse "$@"
set -- ${rest[@]+"${rest[@]}"}
need name zone
case $verb in create | resume) need type runtime ;; esac
case $verb in
  run | resume) [ $# -gt 0 ] || die "$verb needs the training's flags after --, such as -- --config C --workdir DIR" ;;
  *) [ $# -eq 0 ] || die "$verb takes nothing after --" ;;
esac
where=(--zone="$zone")
if [ -n "$project" ]; then where+=(--project="$project"); fi

resource() { # VERB FLAGS...
  local what=$1
  shift
  call gcloud compute tpus queued-resources "$what" "$name" "${where[@]}" "$@"
}

on() { # WORKER COMMAND
  call gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="$1" --command="$2"
}

# The state of the slice; NONE where nothing has its name. Fails where gcloud cannot tell.
state() {
  local said ok=1
  said=$(mktemp)
  resource describe '--format=value(state.state)' 2>"$said" || ok=""
  cat "$said" >&2
  if [ -z "$ok" ] && grep -q NOT_FOUND "$said"; then ok=1 && echo NONE; fi
  rm -f "$said"
  [ -n "$ok" ]
}

create() {
  resource create --node-id="$name" --accelerator-type="$type" --runtime-version="$runtime" \
    ${spot:+--spot}
  await_active
}

await_active() {
  local now failed=0
  if [ -n "$dry_run" ]; then
    state
    return
  fi
  while true; do
    # The wait can last for hours, and a network fails now and then.
    if now=$(state); then
      failed=0
    else
      now="not known" failed=$((failed + 1))
      [ "$failed" -lt 10 ] || die "gcloud does not tell the state of the slice $name"
    fi
    case $now in
      ACTIVE) return ;;
      FAILED | SUSPENDED | SUSPENDING | NONE) die "the slice $name is $now, expected ACTIVE" ;;
    esac
    echo "   $name: $now" >&2
    sleep "${TPU_VM_POLL:-30}"
  done
}

# How a host gets a package of Debian's. A new one upgrades itself meanwhile, and locks them; of the
# two, update has no option to wait.
packages() {
  local get="sudo apt-get -qq"
  echo "for i in \$(seq 60); do $get update && break; sleep 10; done; $get -o DPkg::Lock::Timeout=600 install -y $1"
}

install() {
  idle
  pack
  call gcloud compute tpus tpu-vm scp "$archive" "$name:gemma_lora.tar.gz" "${where[@]}" \
    --worker=all
  # The images hold Python 3.10; Debian may have another without what makes a venv.
  local python
  python="for p in python3.13 python3.12 python3.11; do \$p -c 'import ensurepip' 2>/dev/null && break; done || { $(packages python3.11-venv); }"
  on all "{ $python; } && $(unpacked gemma_lora "$extras")"
  if [ -n "$nfs" ]; then
    # A name that one host asks for too early would else count as missing for half a minute.
    on all "$(packages nfs-common) && mkdir -p share && { mountpoint -q share || sudo mount -t nfs -o lookupcache=positive $(quoted "$nfs") share; }"
  fi
}

# How a host says that a run is under way: a process of its session is alive.
alive="kill -0 -- \"-\$(cat gemma_lora/run.pid 2>/dev/null)\" 2>/dev/null"
busy="if $alive; then echo 'error: a run is under way' >&2; exit 2; fi"

# Ends the script where a run is under way, below which no file may change.
idle() { on all "$busy"; }

# Started in a session of its own, so that it outlives the connection. Its shell waits for the
# training, also when both are asked to stop, and writes how it ended.
run() {
  local train
  train="$(quoted .venv/bin/python -m gemma_lora.train --coordinator auto "$@")"
  local there="[ -x gemma_lora/.venv/bin/python ] || { echo 'error: nothing is installed: tpu_vm.sh install' >&2; exit 2; }"
  on all "$busy; $there; cd gemma_lora || exit 2; rm -f run.status run.stopping; setsid nohup bash -c $(quoted "trap : TERM; $train; echo \$? >run.status") >run.log 2>&1 </dev/null & echo \$! >run.pid"
}

logs() {
  local none="[ -e run.pid ] || { echo 'error: no run was started' >&2; exit 2; }"
  local lost="echo 'error: the run was killed, or its host restarted; resume continues it' >&2; exit 1"
  on "$worker" "cd gemma_lora || exit 2; $none; tail -n +1 --pid=\"\$(cat run.pid)\" -F run.log; [ -s run.status ] || { $lost; }; exit \"\$(cat run.status)\""
}

# A second signal would end the run at once, without saving.
stop() {
  on all "$alive || { echo 'error: no run is under way' >&2; exit 2; }; cd gemma_lora; ! [ -e run.stopping ] || { echo 'it is stopping already'; exit 0; }; touch run.stopping; kill -TERM -- \"-\$(cat run.pid)\""
}

resume() {
  local now
  now=$(state) || die "gcloud does not tell the state of the slice $name"
  if [ -n "$dry_run" ]; then
    echo "$now"
    echo "# of a slice that was preempted:"
    now=SUSPENDED
  fi
  case $now in
    # An earlier start may have ended before all was installed, or a host may have been restarted.
    ACTIVE) install ;;
    NONE) create; install ;;
    # Still in the queue: to ask anew would lose the place.
    ACCEPTED | PROVISIONING | CREATING | WAITING_FOR_RESOURCES) await_active; install ;;
    FAILED | SUSPENDED | SUSPENDING) delete; create; install ;;
    *) die "the slice $name is '$now', expected one that is there, waits or was preempted; wait, or delete it" ;;
  esac
  run "$@"
}

delete() { resource delete --force --quiet; }

"$verb" "$@"
