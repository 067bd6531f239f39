# What tpu_vm.sh and gpu.sh share; sourced. They set `verb`, and `dry_run` to 1 or nothing.
# shellcheck shell=bash disable=SC2034,SC2154

die() {
  echo "error: $*" >&2
  exit 2
}

# The comment at the head of the script, without its marks.
usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "launch/${0##*/}"; }

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

# Reads a verb of $verbs and the flags: those of $switches become 1, those of $flags take a value.
# `rest` is what stands after --.
parse() {
  case ${1:-} in
    -h | --help) usage; exit 0 ;;
    '') die "no verb, expected one of: $verbs (--help explains)" ;;
  esac
  verb=$1
  shift
  case " $verbs " in *" $verb "*) ;; *) die "unknown verb '$verb', expected one of: $verbs" ;; esac
  local flag # no flag has this name
  while [ $# -gt 0 ]; do
    case $1 in
      -h | --help) usage; exit 0 ;;
      --) shift; break ;;
    esac
    flag=${1#--}
    flag=${flag%%=*}
    if [[ $1 == "--$flag" && " $switches " == *" $flag "* ]]; then
      printf -v "${flag//-/_}" 1
      shift
    elif [[ $1 == --?* && " $flags " == *" $flag "* ]]; then
      take "$@"
      printf -v "$flag" %s "$value"
      shift "$used"
    else
      die "unknown flag '$1' of $verb; what the training gets comes after --"
    fi
  done
  rest=("$@")
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
pack() {
  if [ -n "$(git status --porcelain)" ]; then
    echo "note: what is not committed is not copied (git status lists it)" >&2
  fi
  call git archive --format=tar.gz --output="$archive" HEAD
}

# How a host unpacks what `pack` made and was copied to its home, and installs it.
unpacked() { # DIRECTORY EXTRA
  echo "mkdir -p $(quoted "$1") && tar -xzf gemma_lora.tar.gz -C $(quoted "$1") &&" \
    "cd $(quoted "$1") && bash launch/setup.sh .venv $(quoted "$2")"
}
