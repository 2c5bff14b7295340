fn main() {
    std::fs::write(std::env::args().nth(1).unwrap(), farcall::image::IMAGE).unwrap();
}
