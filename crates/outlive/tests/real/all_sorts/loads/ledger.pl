# A ledger in a hash, its sums, and a child that is asked over pipes.
# ledger.pl ROUNDS PACE: ends after ROUNDS, or, where that is 0, once there is a file `finish`.
use strict;
use warnings;
use Digest::SHA qw(sha256_hex);
use IO::Handle;
my ($rounds, $pace) = @ARGV;

pipe(my $question_out, my $question_in) or die;
pipe(my $answer_out, my $answer_in) or die;
my $child = fork() // die;
if ($child == 0) {
    close $question_in;
    close $answer_out;
    $answer_in->autoflush(1);
    while (my $line = <$question_out>) {
        $line =~ s/(\d+)/$1 * 3 % 1009/ge;
        print $answer_in $line;
    }
    exit 0;
}
close $question_out;
close $answer_in;
my %ledger = map { $_ => sprintf("cell %06d %s", $_, sha256_hex($_)) } 0 .. 399;
$question_in->autoflush(1);
open(my $progress, '>>', 'progress') or die;
$progress->autoflush(1);
my ($done, $last, %seen) = (0, '');
until ($rounds ? $done == $rounds : -e 'finish') {
    my $cell = $done * 7 % 400;
    print $question_in "$done $ledger{$cell}\n";
    my $answer = <$answer_out> // die "the child is gone";
    $last = sha256_hex($last . $answer);
    $seen{substr($last, 0, 2)} += $done;
    $done++;
    print $progress 'x';
    select(undef, undef, undef, $pace) if $pace > 0;
}
close $question_in;
waitpid($child, 0) == $child && $? == 0 or die "the child ended with $?";
my $everything = Digest::SHA->new(256);
$everything->add("$_ $ledger{$_}\n") for sort { $a <=> $b } keys %ledger;
$everything->add("$_ $seen{$_}\n") for sort keys %seen;
open(my $result, '>', 'result') or die;
print $result "$done\n$last\n", $everything->hexdigest, "\n";
close $result or die;
