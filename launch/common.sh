# What tpu_vm.sh and gpu.sh share; sourced. They set `verb`, and `dry_run` to 1 or nothing.
# shellcheck shell=bash disable=SC2034,SC2154

die() {
  echo "error: $*" >&2
  exit 2
}

# The comment at the head of the script, without its marks.
usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; }

# Each argument as one word of any POSIX shell, whatever it holds.
quoted() {
  local word out=""
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./:=,@%+-]*) word="'${word//\'/\'\\\'\'}'" ;;
    esac
    out+="${out:+ }$word"
  done
  printf '%s' "$out"
}

# Prints a command, and runs it unless this is a dry run.
call() {
  if [ -n "$dry_run" ]; then
    printf '%s\n' "$(quoted "$@")"
  else
    printf '+ %s\n' "$(quoted "$@")" >&2
    "$@"
  fi
}

# The value of a flag: --name VALUE or --name=VALUE; sets `value` and `used`, the words it took.
take() {
  case $1 in
    *=*) value=${1#*=} used=1 ;;
    *) [ $# -gt 1 ] || die "$1 needs a value"
      value=$2 used=2 ;;
  esac
  [ -n "$value" ] || die "${1%%=*} needs a value"
}

# Stops where a variable is empty: the flag of that name is missing.
need() {
  local flag # no flag has this name
  for flag in "$@"; do
    [ -n "${!flag}" ] || die "$verb needs --$flag"
  done
}

archive=${TMPDIR:-/tmp}/gemma_lora-$(id -un).tar.gz

# The committed files of this tree, in $archive.
pack() { call git archive --format=tar.gz --output="$archive" HEAD; }

# How a host unpacks what `pack` made and was copied to its home, and installs it.
unpacked() { # DIRECTORY EXTRA
  echo "mkdir -p $(quoted "$1") && tar -xzf gemma_lora.tar.gz -C $(quoted "$1") &&" \
    "cd $(quoted "$1") && bash launch/setup.sh .venv $2"
}
