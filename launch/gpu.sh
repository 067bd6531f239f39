#!/usr/bin/env bash
# A run on GPUs: of this machine, of several over ssh, or as a Slurm job.
#   bash launch/gpu.sh VERB [--dry-run] ...
#   install [--hosts A,B,...] [--dir DIR] [--extras gpu,gs]    copy the committed files to the hosts
#           and install them with those extras
#   run     [--hosts A,B,...] [--dir DIR] [--port 8476] -- --config C --workdir DIR ...
#           start gemma_lora.train on all hosts and show what it prints; process 0 is on the first,
#           which the others reach by its name. Ctrl-C stops it at a step that is saved.
#   slurm   --nodes N --gpus G [--cpus C] [--partition P] [--time T] -- --config C --workdir DIR ...
#           one task a GPU, of C processors; at the end of the time it stops at a step that is saved.
#           What else a site asks for Slurm takes from SBATCH_ACCOUNT, SBATCH_MEM_PER_NODE, ...
# Without --hosts it is this machine and this directory; else DIR (gemma_lora) in each home. On
# several hosts the workdir must be on a file system that all of them share. The same command
# continues a run. --dry-run prints the commands instead.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
verbs="install run slurm"
switches="dry-run"
case ${1:-} in
  install) flags="hosts dir extras" ;;
  run) flags="hosts dir port" ;;
  *) flags="nodes gpus cpus partition time" ;;
esac
dry_run="" hosts="" dir=gemma_lora port=8476 extras=gpu,gs nodes="" gpus="" cpus="" partition="" time=""
# shellcheck source=launch/common.sh
. launch/common.sh

parse "$@"
set -- ${rest[@]+"${rest[@]}"}
case $verb in
  install) [ $# -eq 0 ] || die "install takes nothing after --" ;;
  *) [ $# -gt 0 ] || die "$verb needs the training's flags after --, such as -- --config C --workdir DIR" ;;
esac
case $verb in slurm) need nodes gpus ;; esac
for number in "$port" "${nodes:-1}" "${gpus:-1}" "${cpus:-1}"; do
  case $number in 0* | *[!0-9]*) die "'$number' is no positive number (--port, --nodes, --gpus, --cpus)" ;; esac
done
IFS=, read -ra host <<<"$hosts"
for one in ${host[@]+"${host[@]}"}; do
  case $one in '' | -*) die "--hosts is '$hosts', expected names with commas between" ;; esac
done
train=(.venv/bin/python -m gemma_lora.train)

install() {
  if [ -z "$hosts" ]; then
    call bash launch/setup.sh .venv "$extras"
    return
  fi
  pack
  for one in "${host[@]}"; do
    call scp "$archive" "$one:gemma_lora.tar.gz"
    call ssh "$one" "$(unpacked "$dir" "$extras")"
  done
}

run() {
  if [ -z "$hosts" ]; then
    call "${train[@]}" "$@"
    return
  fi
  local i status=0 code place pids=()
  if [ -z "$dry_run" ]; then trap 'stop' INT TERM; fi
  for i in "${!host[@]}"; do
    place=(--coordinator "${host[0]#*@}:$port" --processes "${#host[@]}" --process "$i")
    # exec: the pid is then that of the training. The homes of all hosts may be one. Of a function in
    # the background Ctrl-C would end the ssh, and with it what the training prints to.
    {
      trap '' INT
      call ssh "${host[$i]}" "cd $(quoted "$dir") && echo \$\$ >run.\$(hostname).pid && exec $(quoted "${train[@]}" "${place[@]}" "$@")"
    } &
    pids+=($!)
    if [ -n "$dry_run" ]; then wait $!; fi # in their order
  done
  for i in "${!pids[@]}"; do
    code=0
    wait "${pids[$i]}" || code=$?
    # A signal ends the wait, not the training.
    while kill -0 "${pids[$i]}" 2>/dev/null; do code=0; wait "${pids[$i]}" || code=$?; done
    if [ "$code" -ne 0 ]; then
      echo "error: ${host[$i]} ended with status $code" >&2
      status=$code
    fi
  done
  return "$status"
}

stop() {
  for one in "${host[@]}"; do
    call ssh "$one" "kill -TERM \"\$(cat $(quoted "$dir")/run.\$(hostname).pid)\"" || true
  done
}

slurm() {
  local flags=(--nodes="$nodes" --ntasks-per-node="$gpus" --gres="gpu:$gpus" --requeue
    --open-mode=append --signal=TERM@120 --job-name=gemma_lora --output=gemma_lora-%j.log)
  if [ -n "$cpus" ]; then flags+=(--cpus-per-task="$cpus"); fi # which srun does not take from there
  if [ -n "$partition" ]; then flags+=(--partition="$partition"); fi
  if [ -n "$time" ]; then flags+=(--time="$time"); fi
  call sbatch "${flags[@]}" --wrap="exec srun --kill-on-bad-exit=1${cpus:+ --cpus-per-task=$cpus} $(quoted "${train[@]}" --coordinator auto "$@")"
}

"$verb" "$@"
