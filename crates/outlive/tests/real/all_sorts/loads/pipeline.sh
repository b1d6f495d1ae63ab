# Lines of a ledger through a pipe, a second shell and gzip into a file.
# pipeline.sh ROUNDS PACE: ends after ROUNDS, or, where that is 0, once there is a file `finish`.
rounds=$1 pace=$2

produce() {
    # To wait for a moment without a program: for what nobody says.
    [ "$pace" = 0 ] || { mkfifo pause && exec 9<>pause; }
    exec 8>>progress
    local cells=() x=1 n=0 cell
    for ((cell = 0; cell < 300; cell++)); do
        ((x = (x * 1103515245 + 12345) % 2147483648))
        printf -v cells[cell] 'cell %06d %010d %010d' "$cell" "$x" "$((x * 7919 % 1000003))"
    done
    while [ "$rounds" = 0 ] && [ ! -e finish ] || [ "$n" -lt "$rounds" ]; do
        ((x = (x * 1103515245 + 12345) % 2147483648))
        echo "$n $x ${cells[n % 300]}"
        ((++n))
        if [ "$pace" != 0 ]; then
            printf x >&8
            read -t "$pace" -u 9
        fi
    done
    printf '%s\n' "${cells[@]}"
    echo "$n" >result
}

produce | while read -r line; do echo "$line :: ${#line}"; done | gzip -n -9 >packed
for status in "${PIPESTATUS[@]}"; do
    [ "$status" = 0 ] || exit 1
done
