# Sourced by demo.sh and poems.sh: commands with their time, and those that are skipped once their file is there.
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
