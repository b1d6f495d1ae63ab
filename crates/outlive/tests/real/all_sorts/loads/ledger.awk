# A ledger in an array, and sums of it.
# awk -v rounds=ROUNDS -v pace=PACE: ends after ROUNDS, or, where that is 0, once there is a file
# `finish`.
function next_number() {
    x = (x * 69069 + 12345) % 4294967296
    return x
}
function ended(   line, there) {
    if (rounds > 0) return done == rounds
    there = (getline line < "finish") >= 0
    close("finish")
    return there
}
BEGIN {
    x = 1
    for (cell = 0; cell < 400; cell++)
        ledger[cell] = sprintf("cell %06d %010d %010d", cell, next_number(), next_number())
    while (!ended()) {
        text = ledger[done * 7 % 400]
        for (at = 1; at <= length(text); at++)
            sum = (sum * 31 + index("0123456789cel ", substr(text, at, 1))) % 1000003
        sums[sum % 100] += done
        done++
        printf "x" >> "progress"
        fflush("progress")
        if (pace > 0) system("sleep " pace)
    }
    print done > "result"
    print sum > "result"
    for (cell = 0; cell < 400; cell++) print ledger[cell] > "result"
    for (at = 0; at < 100; at++) print sums[at] + 0 > "result"
}
