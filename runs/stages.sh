# Sourced by demo.sh, poems.sh and recipe.sh: commands with their time, those that are skipped once their file is there,
# and one beside others.
stage() { # stage NAME COMMAND...: run it, and say how long it took
    local name=$1 start=$SECONDS
    shift
    printf '\n== %s: %s\n' "$name" "$*"
    "$@"
    printf -- '-- %s took %d s\n' "$name" $((SECONDS - start))
}

once() { # once FILE NAME COMMAND...: the same, unless FILE is there
    local file=$1
    shift
    if [ -e "$file" ]; then
        printf '\n== %s: %s is there, skipped\n' "$1" "$file"
    else
        stage "$@"
    fi
}

aside() { # aside LOG NAME COMMAND...: run it beside what follows, into a file, until `join`
    aside_log=$1
    mkdir -p "$(dirname "$1")"
    printf '\n== %s, beside what follows, into %s: %s\n' "$2" "$1" "${*:3}"
    stage "${@:2}" > "$1" 2>&1 &
    aside_pid=$!
    trap 'pkill -TERM -P "$aside_pid" 2> /dev/null; wait "$aside_pid"' EXIT # as Ctrl-C does not reach it
}

join() { # wait for what runs aside; its failure is one of the script
    if ! wait "$aside_pid"; then
        tail -n 3 "$aside_log" >&2
        return 1
    fi
    trap - EXIT
    tail -n 1 "$aside_log"
}
